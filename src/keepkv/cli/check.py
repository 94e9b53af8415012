"""`keepkv check`: whether a model works with keepkv, and what a budget would save."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from keepkv.cli.options import Debug, Device, Dtype, Json, argument
from keepkv.cli.progress import bar
from keepkv.errors import ModelError


def check(
    model: Annotated[str, argument('"smollm2", a model folder, or a Hugging Face id.', "MODEL")],
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check whether a model works with keepkv, on the model itself, and say what a budget would save.

    It tries, on some random tokens, that the logits are those of transformers' cache where every token is kept, that a
    compressed cache is the one that is attended to, and that forks and files go on as the cache itself. The status is 0 if all
    of that holds, 1 if something does not, and 2 if the model is refused: the error says which property is missing.

    $ keepkv check smollm2
    $ keepkv check your/model --dtype bfloat16 --json
    """
    with bar(f"loading {model}") as line:
        from keepkv.cli import console
        from keepkv.inspection import checkup
        from keepkv.models import loading

        lm, _ = loading.load(model, device, dtype)
        line.phase("checking")
        found = checkup.check(lm)
    if found.refusal:
        raise ModelError(found.refusal)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        console.show_checkup(found)
    if not found.passed:
        raise typer.Exit(1)
