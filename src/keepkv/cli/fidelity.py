"""`keepkv fidelity`: how far compressed caches are from the full cache on a text."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from keepkv.cli.options import (
    COMPRESSION,
    DEFAULT,
    Debug,
    Device,
    Dtype,
    File,
    Json,
    Model,
    Repeat,
    Seed,
    listed,
    option,
    warn_if_long,
)
from keepkv.cli.progress import bar, err
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
        str, option('How the kept keys and values are stored, separated by commas: "bfloat16,int8,int4".', "NAMES", COMPRESSION)
    ] = DEFAULT.slot_dtype,
    full_dtype: Annotated[
        str, option('The dtype in which the full cache is counted, for shares; "auto" is the model\'s.', "DTYPE", COMPRESSION)
    ] = DEFAULT.full_dtype,
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
    $ keepkv fidelity book.txt --methods keepkv --slot-dtype bfloat16,int8,int4 --full-dtype bfloat16 --json
    """
    with bar(f"loading {model}") as line:
        from keepkv.budget import Budget as Limit
        from keepkv.cli import console
        from keepkv.eval import fidelity as measuring
        from keepkv.methods import get
        from keepkv.models import loading
        from keepkv.slots.slot_dtype import slot_dtype_of
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
            Recipe(repeat=repeat, seed=seed, full_dtype=full_dtype),
            slot_dtypes,
            lambda step: show_progress(step, steps),
        )
    if as_json:
        typer.echo(json.dumps([record.to_dict() for record in records]))
    else:
        console.show_fidelity(records)
