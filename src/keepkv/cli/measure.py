"""`keepkv inspect`, `fidelity` and `methods`: what a compression does, in numbers and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from keepkv.cli.options import (
    COMPRESSION,
    DEFAULT,
    OUTPUT,
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
    argument,
    checked,
    listed,
    option,
    warn_if_long,
)
from keepkv.cli.progress import bar, err
from keepkv.errors import InputError
from keepkv.recipe import Recipe

TEXT = "Text"


def fidelity(
    file: File,
    methods: Annotated[
        str, option("Compression methods, separated by commas. See keepkv methods.", "NAMES", COMPRESSION)
    ] = "keepkv,snapkv,h2o",
    budgets: Annotated[
        str,
        option('Budgets, separated by commas: shares ("10%"), slots ("512") or bytes ("64MB").', "BUDGETS", COMPRESSION),
    ] = DEFAULT.budget_text,
    slot_dtype: Annotated[
        str, option('How the kept keys and values are stored, separated by commas: "float,int8,int4".', "NAMES", COMPRESSION)
    ] = DEFAULT.slot_dtype,
    repeat: Repeat = "never",
    segments: Annotated[int, option("Number of segments of the text to measure on.", "N", TEXT, min=1)] = 3,
    context_tokens: Annotated[int, option("Tokens of a segment that are compressed.", "TOKENS", TEXT, min=16)] = 2048,
    continuation_tokens: Annotated[
        int, option("True next tokens of a segment, on which both caches are compared.", "TOKENS", TEXT, min=2)
    ] = 192,
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = DEFAULT.seed,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure on your own text how far compressed caches are from the full cache.

    Segments of the text are read and compressed. Then their true continuation is fed, and the next-token distributions are
    compared with those of the full cache: rise of the negative log-likelihood, KL divergence, top-1 agreement.

    $ keepkv fidelity book.txt
    $ keepkv fidelity book.txt --methods keepkv,snapkv,h2o,expected --budgets 50%,10%,5%
    $ keepkv fidelity book.txt --methods keepkv --slot-dtype float,int8,int4 --json
    """
    with bar(f"loading {model}") as line:
        from keepkv.budget import Budget as Limit
        from keepkv.cli import console
        from keepkv.eval import fidelity as measuring
        from keepkv.methods import get
        from keepkv.models import loading
        from keepkv.slots.quantized import slot_dtype_of
        from keepkv.text.file import read_text

        names = listed(methods, "--methods", get)
        limits = listed(budgets, "--budgets", Limit.parse)
        slot_dtypes = listed(slot_dtype, "--slot-dtype", slot_dtype_of)
        text = read_text(file)
        lm, tokenizer = loading.load(model, device, dtype)
        ids = measuring.split_into_segments(tokenizer, text, segments, context_tokens, continuation_tokens)
        warn_if_long(lm, context_tokens + continuation_tokens)
        if len(ids) < segments:
            err.print(f"[yellow]warning:[/yellow] the text is short: it has {len(ids)} segments instead of {segments}")
        show_progress = line.phase("measuring")
        steps = measuring.steps(len(ids), names, limits, slot_dtypes)
        records = measuring.measure(
            lm,
            ids,
            continuation_tokens,
            names,
            limits,
            Recipe(repeat=repeat, seed=seed),
            slot_dtypes,
            lambda step: show_progress(step, steps),
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
    html: Annotated[
        Path | None,
        option("Write an HTML page with figures and the text with what was kept.", "FILE", OUTPUT, show_default=False),
    ] = None,
    png: Annotated[
        Path | None,
        option("Write the figures as a PNG. Needs pip install 'keepkv\\[plot]'.", "FILE", OUTPUT, show_default=False),
    ] = None,
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = DEFAULT.seed,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a compression makes of a text, layer by layer: slots, predicted errors, votes, and what was kept.

    The errors are measured on queries of the text itself that the fit has not seen.

    $ keepkv inspect report.txt
    $ keepkv inspect report.txt --budget 5% --html report.html
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
        result = anatomy.inspect(lm, tokenizer, prompt, model, recipe, line.phase)
        try:
            if html:
                html.write_text(page(result), encoding="utf-8")
            if png:
                save(result, png)
        except OSError as error:
            raise InputError(f"{error.filename!r} cannot be written ({error.strerror}): give another file") from error
    if as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        console.show_anatomy(result)


def methods(
    names: Annotated[list[str] | None, argument("Show the pages of these methods.", "NAME...")] = None,
    pages: Annotated[
        Path | None, option("Write a page for every method into this folder.", "FOLDER", OUTPUT, show_default=False)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the compression methods, or explain some: equations, cost, memory, strengths and weaknesses.

    $ keepkv methods
    $ keepkv methods snapkv chelsea
    $ keepkv methods --json | jq ".[].name"
    """
    from keepkv.methods import METHODS, get
    from keepkv.methods.pages import facts, page, write

    table = [get(name) for name in names] if names else list(METHODS.values())
    if pages is not None:
        try:
            count = write(table, pages)
        except OSError as error:
            raise InputError(f"{str(pages)!r} cannot be written ({error.strerror}): give another folder") from error
        err.print(f"wrote {count} files to {pages}", markup=False)
        return
    if as_json:
        typer.echo(json.dumps([facts(method) for method in table], ensure_ascii=False))
        return
    from keepkv.cli import console

    if names:
        console.show_pages([page(method) for method in table])
    else:
        console.show_methods()
