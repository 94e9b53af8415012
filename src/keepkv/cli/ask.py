"""`keepkv ask`: questions about a text, or about compiled documents."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from keepkv.cli.options import (
    COMPRESSION,
    DEFAULT,
    OUTPUT,
    Chunk,
    Debug,
    Device,
    Dtype,
    Json,
    Keep,
    Lookback,
    MaxNewTokens,
    Method,
    Model,
    Repair,
    Repeat,
    Seed,
    SlotDtype,
    argument,
    checked,
    flag,
    listed,
    option,
    warn_if_long,
    was_typed,
)
from keepkv.cli.progress import bar
from keepkv.errors import InputError
from keepkv.paths import SUFFIX
from keepkv.recipe import Recipe


def ask(
    context: typer.Context,
    file: Annotated[str, argument("A text file, - for standard input, or a .keep file made by keepkv compile.", "FILE")],
    questions: Annotated[
        list[str], argument("One question or several. More .keep files may stand before them.", "QUESTION...")
    ],
    budget: Annotated[
        str,
        option(
            'How much of the cache to keep: a share of its bytes ("10%"), slots per KV head ("512"), or bytes ("64MB"). '
            '"auto" takes the smallest budget whose predicted error is within --tolerance.',
            "BUDGET",
            COMPRESSION,
        ),
    ] = DEFAULT.budget_text,
    method: Method = DEFAULT.method_name,
    slot_dtype: SlotDtype = DEFAULT.slot_dtype,
    compare: Annotated[
        str, option('More methods to answer with, side by side: "full,snapkv".', "NAMES", OUTPUT, show_default=False)
    ] = "",
    repeat: Repeat = DEFAULT.repeat,
    keep: Keep = None,
    tolerance: Annotated[
        float, option("With --budget auto: the share of its output that an attention head may lose.", "SHARE", COMPRESSION)
    ] = DEFAULT.tolerance,
    chunk: Chunk = None,
    lookback: Lookback = DEFAULT.lookback,
    sources: Annotated[bool, flag("Show the passages that were looked back at for each answer.", "--sources", OUTPUT)] = False,
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

    The text is read once and compressed before the questions are seen, so that every answer starts from the same cache.

    $ keepkv ask report.txt "Who signed it?" "When?"
    $ keepkv ask report.txt "Who signed it?" --budget 5% --compare full,snapkv
    $ keepkv ask report.txt "What is the order number?" --lookback auto --sources
    $ pdftotext paper.pdf - | keepkv ask - "What was measured?" --json | jq .answers
    $ keepkv ask report.keep minutes.keep "Who signed it?"    (made by keepkv compile)
    """
    documents, texts = split([file, *questions])
    if documents:
        _refuse_settings(context, documents[0])
        if repair and len(documents) == 1:
            raise InputError("--repair is for several compiled documents: keepkv ask A.keep B.keep QUESTION --repair 15%")
        model_name = model if was_typed(context, "model") else None
        return ask_compiled(documents, texts, model_name, device, dtype, max_new_tokens, repair, as_json)
    if repair:
        raise InputError("--repair is for several compiled documents: keepkv ask A.keep B.keep QUESTION --repair 15%")
    if was_typed(context, "tolerance") and budget != "auto":
        raise InputError(f"--tolerance is for --budget auto, and the budget is {budget}: leave one of the two out")
    if sources and lookback == "off":
        raise InputError("--sources shows what is looked back at, and --lookback is off: leave one of the two out")
    settings = {"tolerance": tolerance, "chunk": chunk, "seed": seed, "lookback": lookback}
    recipe = Recipe(budget, method, slot_dtype, repeat, tuple(keep or ()), **settings)
    with bar(f"loading {model}") as line:
        from keepkv.cli import console
        from keepkv.methods import get
        from keepkv.models import loading
        from keepkv.text.ask import ask as answer_all
        from keepkv.text.file import read_text
        from keepkv.text.prompt import Prompt

        checked(recipe, auto=True)
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
        output, *comparisons = [{"model": model, **result.to_dict()} for result in results]
        if comparisons:
            output["compare"] = comparisons
        typer.echo(json.dumps(output, ensure_ascii=False))
        return None
    console.show_asked(results)
    if sources:
        console.show_sources(results[0])
    full = next((result for result in results if result.method == "full"), None)
    if full is not None and results[0] is not full:
        console.show_verdict(results[0], full)
    return None


def _refuse_settings(context: typer.Context, document: str) -> None:
    """Raises InputError for options that only texts have."""
    texts_only = (
        "budget",
        "method",
        "slot_dtype",
        "compare",
        "repeat",
        "keep",
        "tolerance",
        "chunk",
        "lookback",
        "sources",
        "seed",
    )
    for name in texts_only:
        if was_typed(context, name):
            raise InputError(
                f"--{name.replace('_', '-')} is for texts, and {document} is compiled already: "
                "leave the option out, or compile the text again with it"
            )


def ask_compiled(
    files: list[str],
    questions: list[str],
    model: str | None,
    device: str,
    dtype: str,
    max_new_tokens: int,
    repair: float,
    as_json: bool,
) -> None:
    """What `keepkv ask A.keep B.keep "..."` does."""
    if not questions:
        raise InputError('there is no question: give one after the files, as in keepkv ask report.keep "Who signed it?"')
    with bar("loading") as line:
        import time

        from keepkv.cli import console
        from keepkv.documents.document import answer, load, model_of
        from keepkv.models import identity, loading

        model_name = model or model_of(Path(files[0])) or "smollm2"
        lm, tokenizer = loading.load(model_name, device, dtype)
        model_id, tokenizer_id = identity.of_model(lm), identity.of_tokenizer(tokenizer)
        start = time.perf_counter()
        documents = [load(Path(file), lm, tokenizer_id, model_id) for file in files]
        if len(documents) == 1:
            document = documents[0]
        else:
            from keepkv.documents.joining.joined import joined

            document = joined(lm, documents, repair, line.phase("joining"))
        seconds = time.perf_counter() - start
        warn_if_long(lm, document.tokens + max_new_tokens)
        result = answer(lm, tokenizer, document, questions, max_new_tokens, seconds, line.phase)
    if as_json:
        typer.echo(json.dumps({"model": model_name, "documents": files, **result.to_dict()}, ensure_ascii=False))
    else:
        console.show_asked([result])


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Compiled documents, which are the leading arguments that end in .keep, and the rest.

    Raises InputError for a file name among the rest, which would be taken for a question.
    """
    count = next((i for i, argument in enumerate(arguments) if not argument.endswith(SUFFIX)), len(arguments))
    late = [argument for argument in arguments[count:] if re.fullmatch(rf"\S+{re.escape(SUFFIX)}", argument)]
    if late:
        raise InputError(
            f"{late[0]!r} stands after {arguments[count]!r}: give all {SUFFIX} files first, then the questions "
            "(a text can join them when it is compiled too: keepkv compile)"
        )
    return list(arguments[:count]), list(arguments[count:])
