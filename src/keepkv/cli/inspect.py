"""`keepkv inspect`: what a compression makes of a text, in a table, on a page, as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from keepkv.cli.options import (
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
    checked,
    option,
    warn_if_long,
)
from keepkv.cli.progress import bar
from keepkv.errors import InputError
from keepkv.paths import write_file
from keepkv.recipe import Recipe


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
                write_file(html, page(result))
            if png:
                save(result, png)
        except OSError as error:
            raise InputError(f"{error.filename!r} cannot be written ({error.strerror}): give another file") from error
    if as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        console.show_anatomy(result)
