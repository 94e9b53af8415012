"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from keepkv.budget import TOLERANCE
from keepkv.errors import InputError, KeepKVError
from keepkv.eval import commands
from keepkv.files import commands as files
from keepkv.files.names import split
from keepkv.options import (
    Chunk,
    Debug,
    Device,
    Dtype,
    File,
    Form,
    Json,
    Keep,
    Limit,
    Model,
    Name,
    Reference,
    Repair,
    Seed,
    chunk_of,
    understood,
    warn_if_long,
    was_typed,
)
from keepkv.progress import bar, err
from keepkv.serving import commands as serving

app = typer.Typer(
    name="keepkv", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]},
    help="A KV cache ten times smaller, with the model answering as if nothing had been removed.",
)  # fmt: skip


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from keepkv import __version__

        typer.echo(__version__)
        raise typer.Exit


app.command("compile")(files.compile)
app.add_typer(files.store, name="store")
app.command()(serving.serve)


@app.command()
def ask(
    context: typer.Context,
    file: Annotated[
        str, typer.Argument(help="A text file, - for standard input, or a compiled .keep file.", show_default=False)
    ],
    questions: Annotated[
        list[str], typer.Argument(help="One question or several; before them, more .keep files to join.", show_default=False)
    ],
    budget: Limit = "0.1",
    method: Name = "keepkv",
    slots: Form = "float",
    compare: Annotated[str, typer.Option(help="More methods, side by side: full,snapkv", show_default=False)] = "",
    reference: Reference = "auto",
    keep: Keep = None,
    tolerance: Annotated[float, typer.Option(help="With --budget auto: the share of its outputs a head may lose.")] = TOLERANCE,
    chunk: Chunk = None,
    model: Model = "smollm2",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="An answer's greatest length.")] = 64,
    repair: Repair = 0.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer questions about a long text from a compressed cache.

    The text is read once and compressed [bold]before[/bold] the questions are seen; each answer starts from that same cache.

    [bold]keepkv ask report.txt "Who signed it?" "When?"[/bold]

    [bold]keepkv ask report.txt "Who signed it?" --budget 5% --compare full,snapkv[/bold]

    [bold]keepkv ask report.txt "Who signed it?" --budget auto --tolerance 0.02 --keep "[0-9]+"[/bold]

    [bold]pdftotext paper.pdf - | keepkv ask - "What was measured?" --json | jq .answers[/bold]

    [bold]keepkv ask report.keep minutes.keep "Who signed it?"[/bold] (compiled before: keepkv compile)
    """
    compiled, asked = split([file, *questions])
    if compiled:
        recipe = [name for name in ("budget", "method", "slots", "compare", "reference", "keep", "tolerance", "chunk", "seed")
                  if was_typed(context, name)]  # fmt: skip
        if recipe:
            raise InputError(f"--{recipe[0]} is for texts: {compiled[0]} is compiled already, with its own")
        named = model if was_typed(context, "model") else None
        return files.ask_compiled(compiled, asked, named, device, dtype, max_new_tokens, repair, as_json)
    if repair:
        raise InputError("--repair is for joined documents: keepkv ask A.keep B.keep ... --repair 15%")
    with bar(f"loading {model}") as line:
        from keepkv import console, loading
        from keepkv.ask import ask as run
        from keepkv.reading import Prompt

        names, *_ = understood(",".join([method, compare]), "10%" if budget == "auto" else budget, slots)
        if not all(question.strip() for question in questions):
            raise InputError("one of the questions is empty: write each in quotes, one after the other")
        text = loading.read_text(file)
        lm, tokenizer = loading.load(model, device, dtype)
        prompt = Prompt(tokenizer, text)
        warn_if_long(lm, prompt.text.shape[1] + max_new_tokens)
        results = run(
            lm, tokenizer, prompt, questions, names, budget, max_new_tokens, seed, reference, keep or (), tolerance,
            chunk_of(chunk, prompt.text.shape[1], budget), line.phase, slots,
        )  # fmt: skip
    if as_json:
        first, *others = [{"model": model, **result.to_dict()} for result in results]
        typer.echo(json.dumps({**first, **({"compare": others} if others else {})}, ensure_ascii=False))
        return None
    console.show_asked(results)
    full = next((result for result in results if result.method == "full"), None)
    if full is not None and results[0] is not full:
        console.show_verdict(results[0], full)
    return None


@app.command()
def chat(
    budget: Annotated[
        str, typer.Option(help='Slots per KV head ("1024"), bytes ("64MB"), or a growing share ("10%").')
    ] = "1024",
    method: Name = "keepkv",
    slots: Form = "float",
    system: Annotated[str, typer.Option(help="A system prompt; it stays verbatim.", show_default=False)] = "",
    load: Annotated[Path | None, typer.Option(help="Go on with a conversation that /save wrote.", show_default=False)] = None,
    period: Annotated[int, typer.Option(min=1, help="Compress whenever so many tokens have come.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="An answer's greatest length.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest word.")] = 0.7,
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Talk with a model for as long as you like, in memory that does not grow.

    What was said is compressed to the budget as the conversation goes on. /help lists what else can be done.

    [bold]keepkv chat --budget 512[/bold]

    [bold]echo "What is a whale?" | keepkv chat --system "Answer in one sentence."[/bold]
    """
    with bar(f"loading {model}"):
        import torch

        from keepkv import loading
        from keepkv.chat import Chat, lines
        from keepkv.conversation import Conversation

        understood(method, budget, slots)
        lm, tokenizer = loading.load(model, device, dtype)
        torch.manual_seed(seed)
        talk = Chat(
            lambda: Conversation(lm, tokenizer, budget, method, system, period, seed, slots), max_new_tokens, temperature
        )
    if load is not None:
        talk.load(str(load))
    if sys.stdin.isatty():
        err.print("[dim]/help lists the commands, Ctrl-D ends[/dim]")
    talk.run(lines())


@app.command()
def fidelity(
    file: File,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas; see keepkv methods.")] = "keepkv,snapkv,h2o",
    budgets: Annotated[str, typer.Option(help="Budgets, separated by commas: 50%,10%,512,64MB")] = "0.1",
    slots: Annotated[str, typer.Option(help="How slots are stored, separated by commas: float,int8,int4")] = "float",
    segments: Annotated[int, typer.Option(min=1, help="Stretches of the text to measure on.")] = 3,
    context_tokens: Annotated[int, typer.Option(min=16, help="Tokens read and compressed per stretch.")] = 2048,
    continuation_tokens: Annotated[int, typer.Option(min=2, help="True next tokens fed per stretch.")] = 192,
    reference: Reference = "context",
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how far compressed caches are from the full cache on your own text.

    Stretches of the text are read and compressed; then their true continuation is fed, and the next-token distributions
    are compared with those of the full cache: change of the negative log-likelihood, KL divergence, top-1 agreement.

    [bold]keepkv fidelity book.txt --methods keepkv,snapkv,h2o,expected --budgets 50%,10%,5%[/bold]
    """
    with bar(f"loading {model}") as line:
        from keepkv import console, loading
        from keepkv import fidelity as measuring

        names, limits, forms = understood(methods, budgets, slots)
        text = loading.read_text(file)
        lm, tokenizer = loading.load(model, device, dtype)
        stretches = measuring.cut(tokenizer, text, segments, context_tokens, continuation_tokens)
        warn_if_long(lm, context_tokens + continuation_tokens)
        if len(stretches) < segments:
            err.print(f"the text is short: {len(stretches)} stretches instead of {segments}")
        tell = line.phase("measuring")
        of = measuring.steps(len(stretches), names, limits, forms)
        records = measuring.measure(
            lm, stretches, continuation_tokens, names, limits, seed, reference, lambda done: tell(done, of), forms
        )
    if as_json:
        typer.echo(json.dumps([record.to_dict() for record in records]))
    else:
        console.show_fidelity(records)


@app.command()
def inspect(
    file: File,
    budget: Limit = "0.1",
    method: Name = "keepkv",
    reference: Reference = "auto",
    keep: Keep = None,
    html: Annotated[Path | None, typer.Option(help="Write a page: figures, and what was kept.", show_default=False)] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture (needs keepkv\\[plot]).", show_default=False)] = None,
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a compression makes of a text: budgets, errors and votes per layer and head, and what was kept.

    The errors are predicted: they are measured on queries of the text itself that the fit has not seen.

    [bold]keepkv inspect report.txt --html report.html[/bold]
    """
    with bar(f"loading {model}") as line:
        for target in filter(None, (html, png)):
            if target.is_dir() or not target.parent.is_dir():
                raise InputError(f"{str(target)!r} cannot be written: expected a file name in a folder that exists")
        from keepkv import anatomy, console, figure, loading, page
        from keepkv.reading import Prompt

        understood(method, budget)
        if png:
            figure.require()
        text = loading.read_text(file)
        lm, tokenizer = loading.load(model, device, dtype)
        prompt = Prompt(tokenizer, text)
        warn_if_long(lm, prompt.text.shape[1])
        found = anatomy.inspect(lm, tokenizer, prompt, model, method, budget, seed, reference, keep or (), line.phase)
        try:
            if html:
                html.write_text(page.page(found), encoding="utf-8")
            if png:
                figure.save(found, png)
        except OSError as error:
            raise InputError(f"{error.filename!r} cannot be written ({error.strerror})") from error
    if as_json:
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        console.show_anatomy(found)


@app.command()
def methods(
    names: Annotated[list[str] | None, typer.Argument(help="Show these methods' pages.", show_default=False)] = None,
    pages: Annotated[Path | None, typer.Option(help="Write a page for every method there.", show_default=False)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods, or show what some of them do: equations, cost, memory, what they are good and bad at.

    [bold]keepkv methods[/bold]

    [bold]keepkv methods snapkv chelsea[/bold]

    [bold]keepkv methods --json | jq ".[].name"[/bold]
    """
    from keepkv import manual
    from keepkv.methods import METHODS, get

    table = [get(name) for name in names] if names else list(METHODS.values())
    if pages is not None:
        try:
            count = manual.write(table, pages)
        except OSError as error:
            raise InputError(f"{str(pages)!r} cannot be written ({error.strerror})") from error
        err.print(f"{count} files in {pages}")
        return
    if as_json:
        typer.echo(json.dumps([manual.facts(method) for method in table], ensure_ascii=False))
        return
    from keepkv import console

    if names:
        console.show_pages([manual.page(method) for method in table])
    else:
        console.show_methods()


app.command("eval")(commands.evaluate)
app.command("report")(commands.report)


def main() -> None:
    """Runs the command line: a user's mistake ends with one line on standard error and status 2."""
    debug = "--debug" in sys.argv
    try:
        app()
    except KeepKVError as error:
        if debug:
            raise
        _end(str(error), 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        _end("stopped", 130)
    except Exception as error:
        if debug:
            raise
        _end(f"{type(error).__name__}: {error} (an error of keepkv's own: --debug shows where)", 1)


def _end(message: str, status: int) -> None:
    print(f"keepkv: {message}", file=sys.stderr)
    sys.exit(status)
