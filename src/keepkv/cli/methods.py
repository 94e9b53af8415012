"""`keepkv methods`: the compression methods and their pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from keepkv.cli.options import (
    OUTPUT,
    Debug,
    Json,
    argument,
    option,
)
from keepkv.cli.progress import err
from keepkv.errors import InputError


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
