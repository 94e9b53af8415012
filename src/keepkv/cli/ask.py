"""`keepkv ask`: questions about a text, or about compiled documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from keepkv.cli.options import (
    DEFAULT,
    Chunk,
    Debug,
    Device,
    Dtype,
    Json,
    Keep,
    MaxNewTokens,
    Method,
    Model,
    Repair,
    Repeat,
    Seed,
    SlotDtype,
    checked,
    listed,
    warn_if_long,
    was_typed,
)
from keepkv.cli.progress import bar
from keepkv.errors import InputError
from keepkv.paths import SUFFIX
from keepkv.recipe import Recipe


def ask(
    context: typer.Context,
    file: Annotated[
        str, typer.Argument(help="A text file, - for standard input, or a compiled .keep file.", show_default=False)
    ],
    questions: Annotated[
        list[str], typer.Argument(help="One question or several; before them, more .keep files to join.", show_default=False)
    ],
    budget: Annotated[
        str,
        typer.Option(
            help='Share of the tokens ("10%"), slots per KV head ("512"), bytes ("64MB"), or auto: the smallest that '
            "predicts an error within --tolerance."
        ),
    ] = DEFAULT.budget_text,
    method: Method = DEFAULT.method_name,
    slot_dtype: SlotDtype = DEFAULT.slot_dtype,
    compare: Annotated[str, typer.Option(help="More methods, side by side: full,snapkv", show_default=False)] = "",
    repeat: Repeat = DEFAULT.repeat,
    keep: Keep = None,
    tolerance: Annotated[
        float, typer.Option(help="With --budget auto: the share of its output that a head may lose.")
    ] = DEFAULT.tolerance,
    chunk: Chunk = None,
    model: Model = "smollm2",
    max_new_tokens: MaxNewTokens = 64,
    repair: Repair = 0.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = DEFAULT.seed,
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
        settings = ("budget", "method", "slot_dtype", "compare", "repeat", "keep", "tolerance", "chunk", "seed")
        if typed := [name.replace("_", "-") for name in settings if was_typed(context, name)]:
            raise InputError(f"--{typed[0]} is for texts: {compiled[0]} is compiled already, with its own")
        named = model if was_typed(context, "model") else None
        return ask_compiled(compiled, asked, named, device, dtype, max_new_tokens, repair, as_json)
    if repair:
        raise InputError("--repair is for joined documents: keepkv ask A.keep B.keep ... --repair 15%")
    recipe = Recipe(
        budget, method, slot_dtype, repeat, tuple(keep or ()), tolerance=tolerance, chunk=chunk, seed=seed
    )  # fmt: skip
    with bar(f"loading {model}") as line:
        from keepkv.cli import console
        from keepkv.methods import get
        from keepkv.models import loading
        from keepkv.text.ask import ask as answer_all
        from keepkv.text.file import read_text
        from keepkv.text.prompt import Prompt

        checked(recipe)
        others = listed(compare, "--compare", get) if compare else []
        if not all(question.strip() for question in questions):
            raise InputError("one of the questions is empty: write each in quotes, one after the other")
        text = read_text(file)
        lm, tokenizer = loading.load(model, device, dtype)
        prompt = Prompt(tokenizer, text)
        warn_if_long(lm, prompt.text.shape[1] + max_new_tokens)
        compared = [name for name in others if name != method]
        results = answer_all(lm, tokenizer, prompt, questions, recipe, compared, max_new_tokens, line.phase)
    if as_json:
        first, *rest = [{"model": model, **result.to_dict()} for result in results]
        typer.echo(json.dumps({**first, **({"compare": rest} if rest else {})}, ensure_ascii=False))
        return None
    console.show_asked(results)
    full = next((result for result in results if result.method == "full"), None)
    if full is not None and results[0] is not full:
        console.show_verdict(results[0], full)
    return None


def ask_compiled(
    files: list[str], questions: list[str], model: str | None, device: str, dtype: str, max_new_tokens: int, repair: float,
    as_json: bool,
) -> None:  # fmt: skip
    """What `keepkv ask A.keep B.keep "…"` does."""
    if not questions:
        raise InputError('no question: keepkv ask report.keep "Who signed it?"')
    with bar("loading") as line:
        import time

        from keepkv.cli import console
        from keepkv.documents import format, identity
        from keepkv.documents.document import answer, load
        from keepkv.models import loading

        named = model or format.Contents(Path(files[0])).header.get("model", {}).get("name") or "smollm2"
        lm, tokenizer = loading.load(named, device, dtype)
        known, cut = identity.of_model(lm), identity.of_tokenizer(tokenizer)
        start = time.perf_counter()
        parts = [load(Path(file), lm, cut, known) for file in files]
        if len(parts) == 1:
            document = parts[0]
        else:
            from keepkv.documents.joining.joined import joined

            document = joined(lm, parts, repair, line.phase("joining"))
        seconds = time.perf_counter() - start
        warn_if_long(lm, document.tokens + max_new_tokens)
        result = answer(lm, tokenizer, document, questions, max_new_tokens, seconds, line.phase)
    if as_json:
        typer.echo(json.dumps({"model": named, "documents": files, **result.to_dict()}, ensure_ascii=False))
    else:
        console.show_asked([result])


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Compiled documents, the leading arguments that end in .keep, and the rest: questions."""
    count = next((i for i, argument in enumerate(arguments) if not argument.endswith(SUFFIX)), len(arguments))
    return list(arguments[:count]), list(arguments[count:])
