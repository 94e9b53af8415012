"""`keepkv inspect`, `fidelity` and `methods`: what a compression does, in numbers and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from keepkv.cli.options import (
    DEFAULT,
    Budget,
    Debug,
    Device,
    Dtype,
    File,
    Json,
    Keep,
    Method,
    Model,
    Repeat,
    Seed,
    SlotDtype,
    checked,
    listed,
    warn_if_long,
)
from keepkv.cli.progress import bar, err
from keepkv.errors import InputError
from keepkv.recipe import Recipe


def fidelity(
    file: File,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas; see keepkv methods.")] = "keepkv,snapkv,h2o",
    budgets: Annotated[str, typer.Option(help="Budgets, separated by commas: 50%,10%,512,64MB")] = DEFAULT.budget_text,
    slot_dtype: Annotated[str, typer.Option(help="How slots are stored, separated by commas: float,int8,int4")] = "float",
    segments: Annotated[int, typer.Option(min=1, help="Stretches of the text to measure on.")] = 3,
    context_tokens: Annotated[int, typer.Option(min=16, help="Tokens read and compressed per stretch.")] = 2048,
    continuation_tokens: Annotated[int, typer.Option(min=2, help="True next tokens fed per stretch.")] = 192,
    repeat: Repeat = "never",
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = DEFAULT.seed,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how far compressed caches are from the full cache on your own text.

    Stretches of the text are read and compressed; then their true continuation is fed, and the next-token distributions
    are compared with those of the full cache: change of the negative log-likelihood, KL divergence, top-1 agreement.

    [bold]keepkv fidelity book.txt --methods keepkv,snapkv,h2o,expected --budgets 50%,10%,5%[/bold]
    """
    with bar(f"loading {model}") as line:
        from keepkv.budget import Budget as Limit
        from keepkv.cli import console
        from keepkv.eval import fidelity as measuring
        from keepkv.methods import get
        from keepkv.models import loading
        from keepkv.slots.quantized import slot_dtype_of
        from keepkv.text.file import read_text

        names, limits = listed(methods, "--methods", get), listed(budgets, "--budgets", Limit.parse)
        slot_dtypes = listed(slot_dtype, "--slot-dtype", slot_dtype_of)
        text = read_text(file)
        lm, tokenizer = loading.load(model, device, dtype)
        stretches = measuring.cut(tokenizer, text, segments, context_tokens, continuation_tokens)
        warn_if_long(lm, context_tokens + continuation_tokens)
        if len(stretches) < segments:
            err.print(f"the text is short: {len(stretches)} stretches instead of {segments}")
        tell = line.phase("measuring")
        of = measuring.steps(len(stretches), names, limits, slot_dtypes)
        records = measuring.measure(
            lm,
            stretches,
            continuation_tokens,
            names,
            limits,
            Recipe(repeat=repeat, seed=seed),
            slot_dtypes,
            lambda done: tell(done, of),
        )
    if as_json:
        typer.echo(json.dumps([record.to_dict() for record in records]))
    else:
        console.show_fidelity(records)


def inspect(
    file: File,
    budget: Budget = DEFAULT.budget_text,
    method: Method = DEFAULT.method_name,
    slot_dtype: SlotDtype = DEFAULT.slot_dtype,
    repeat: Repeat = DEFAULT.repeat,
    keep: Keep = None,
    html: Annotated[Path | None, typer.Option(help="Write a page: figures, and what was kept.", show_default=False)] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture (needs keepkv\\[plot]).", show_default=False)] = None,
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = DEFAULT.seed,
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
        from keepkv import render
        from keepkv.cli import console
        from keepkv.inspection import anatomy
        from keepkv.inspection.html import page
        from keepkv.inspection.png import save
        from keepkv.models import loading
        from keepkv.text.file import read_text
        from keepkv.text.prompt import Prompt

        recipe = checked(Recipe(budget, method, slot_dtype, repeat, tuple(keep or ()), seed=seed))
        if png:
            render.require_matplotlib()
        text = read_text(file)
        lm, tokenizer = loading.load(model, device, dtype)
        prompt = Prompt(tokenizer, text)
        warn_if_long(lm, prompt.text.shape[1])
        found = anatomy.inspect(lm, tokenizer, prompt, model, recipe, line.phase)
        try:
            if html:
                html.write_text(page(found), encoding="utf-8")
            if png:
                save(found, png)
        except OSError as error:
            raise InputError(f"{error.filename!r} cannot be written ({error.strerror})") from error
    if as_json:
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        console.show_anatomy(found)


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
    from keepkv.methods import METHODS, get
    from keepkv.methods.pages import facts, page, write

    table = [get(name) for name in names] if names else list(METHODS.values())
    if pages is not None:
        try:
            count = write(table, pages)
        except OSError as error:
            raise InputError(f"{str(pages)!r} cannot be written ({error.strerror})") from error
        err.print(f"{count} files in {pages}")
        return
    if as_json:
        typer.echo(json.dumps([facts(method) for method in table], ensure_ascii=False))
        return
    from keepkv.cli import console

    if names:
        console.show_pages([page(method) for method in table])
    else:
        console.show_methods()
