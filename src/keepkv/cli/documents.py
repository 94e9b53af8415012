"""`keepkv compile` and `keepkv store`: documents that are read once, and asked at any time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from keepkv.cli.options import (
    COMPRESSION,
    DEFAULT,
    OUTPUT,
    Budget,
    Chunk,
    Debug,
    Device,
    Dtype,
    Json,
    Keep,
    Method,
    Model,
    Repeat,
    Seed,
    SlotDtype,
    argument,
    checked,
    command,
    flag,
    help_text,
    option,
)
from keepkv.cli.progress import bar, err
from keepkv.errors import InputError
from keepkv.paths import SUFFIX
from keepkv.recipe import Recipe

BATCH = "Several documents"
STORE = "Store"
Docs = Annotated[list[str], argument("Text files, or - for standard input.", "DOC...")]
Exact = Annotated[
    bool, flag("Also keep every key and value, so that joined documents can be repaired (--repair).", "--exact", COMPRESSION)
]
Folder = Annotated[
    Path | None,
    option(
        "The folder of the store. The default is in keepkv's cache folder.",
        "FOLDER",
        STORE,
        "--store",
        envvar="KEEPKV_STORE",
        show_default=False,
    ),
]
KEY_HELP = "A key, the beginning of a key, or the name of the text file."
STORE_HELP = """Keep compiled documents in a folder that several processes can use at once.

$ keepkv store add handbook.txt minutes/*.txt --budget 5%
$ keepkv store list
$ keepkv ask "$(keepkv store show handbook.txt | jq -r .file)" "Who signed it?"
"""
store = typer.Typer(no_args_is_help=True, help=help_text(STORE_HELP))


def compile(
    docs: Docs,
    output: Annotated[
        Path | None,
        option(
            "Where to write: a file (FILE.keep), or a folder, which is made. The default is DOC.keep beside each text.",
            "PATH",
            OUTPUT,
            "-o",
            "--output",
            show_default=False,
        ),
    ] = None,
    budget: Budget = DEFAULT.budget_text,
    method: Method = DEFAULT.method_name,
    slot_dtype: SlotDtype = DEFAULT.slot_dtype,
    repeat: Repeat = DEFAULT.repeat,
    keep: Keep = None,
    chunk: Chunk = None,
    exact: Exact = False,
    ids: Annotated[
        bool,
        typer.Option(
            "--ids/--no-ids",
            help="Whether the file holds the tokens of the text. Anybody can read the text from them.",
            metavar="",
            rich_help_panel=OUTPUT,
        ),
    ] = True,
    resume: Annotated[
        bool, flag("Skip documents whose file was made of the same text in the same way.", "--resume", BATCH)
    ] = False,
    ray: Annotated[
        bool, flag("Compile in parallel with Ray: on the cluster of $RAY_ADDRESS, or on this machine.", "--ray", BATCH)
    ] = False,
    workers: Annotated[int, option("With --ray: the number of workers, each with the model in memory.", "N", BATCH, min=1)] = 2,
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = DEFAULT.seed,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read documents once and write their compressed caches as .keep files, which can be asked at any time.

    $ keepkv compile report.txt && keepkv ask report.keep "Who signed it?"
    $ keepkv compile chapters/*.txt -o compiled --budget 5% --resume
    $ keepkv compile library/*.txt -o compiled --ray --workers 8
    """
    from keepkv.cli.console import line_of

    outputs = targets(docs, output)
    if ray and "-" in docs:
        raise InputError("--ray needs files, which every worker can read: write standard input to a file first")
    compiled: list[dict[str, Any]] = []
    failures: list[tuple[str, str]] = []
    with bar(f"loading {model}") as line:
        from keepkv.documents.batch import Compiler, Order, with_ray

        recipe = checked(Recipe(budget, method, slot_dtype, repeat, tuple(keep or ()), chunk=chunk, seed=seed, exact=exact))
        order = Order(recipe, ids, resume, model, device, dtype)
        if ray:
            progress = line.phase(f"compiling with {workers} workers")
            gpus = 1.0 if "cuda" in device else 0.0
            for number, (doc, outcome) in enumerate(with_ray(docs, outputs, order, workers, gpus)):
                progress(number + 1, len(docs))
                if isinstance(outcome, str):
                    failures.append((doc, outcome))
                else:
                    compiled.append(outcome)
        else:
            compiler = Compiler(order)
            for number, (doc, target) in enumerate(zip(docs, outputs, strict=True)):
                count = f"{number + 1}/{len(docs)} {doc}: " if len(docs) > 1 else ""
                compiled.append(compiler.compile(doc, target, line.counted(count)))
    for facts in compiled:
        if warning := facts.pop("warning"):
            err.print(f"[yellow]warning:[/yellow] {escape(facts['source'])}: {escape(warning)}")
        typer.echo(json.dumps(facts, ensure_ascii=False) if as_json else line_of(facts))
    for doc, reason in failures:
        err.print(f"[red]{escape(doc)}:[/red] {escape(reason)}")
    if failures:
        raise InputError(
            f"{len(failures)} of {len(docs)} documents could not be compiled, for the reasons above: mend them, and run the "
            "same command with --resume"
        )


@command(store)
def add(
    docs: Docs,
    folder: Folder = None,
    budget: Budget = DEFAULT.budget_text,
    method: Method = DEFAULT.method_name,
    slot_dtype: SlotDtype = DEFAULT.slot_dtype,
    repeat: Repeat = DEFAULT.repeat,
    keep: Keep = None,
    chunk: Chunk = None,
    exact: Exact = False,
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = DEFAULT.seed,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile documents into the store. A text that was compiled before in the same way is not compiled again.

    $ keepkv store add handbook.txt minutes/*.txt --budget 5%
    """
    with bar(f"loading {model}") as line:
        from keepkv.documents.store import Store
        from keepkv.models import loading
        from keepkv.text import file

        recipe = checked(Recipe(budget, method, slot_dtype, repeat, tuple(keep or ()), chunk=chunk, seed=seed, exact=exact))
        texts = [file.read_text(doc) for doc in docs]
        lm, tokenizer = loading.load(model, device, dtype)
        shelf = Store.open(folder).for_model(lm, tokenizer, model)
        for doc, text in zip(docs, texts, strict=True):
            entry, new = shelf.add(text, recipe, doc, line.phase)
            if as_json:
                typer.echo(json.dumps(entry.to_dict(), ensure_ascii=False))
            else:
                typer.echo(f"{entry.key[:12]} {'added' if new else 'there already'}: {entry.source}")


@command(store, "list")
def list_(folder: Folder = None, as_json: Json = False, debug: Debug = False) -> None:
    """List the documents of the store, the most recently used first.

    $ keepkv store list
    $ keepkv store list --json | jq ".[].source"
    """
    from keepkv.documents.store import Store

    with Store.open(folder) as shelf:
        entries = shelf.entries()
    if as_json:
        typer.echo(json.dumps([entry.to_dict() for entry in entries], ensure_ascii=False))
    elif entries:
        from keepkv.cli.console import show_entries

        show_entries(entries)
    else:
        err.print("the store is empty: add a document with keepkv store add report.txt")


@command(store)
def show(key: Annotated[str, argument(KEY_HELP, "KEY")], folder: Folder = None, debug: Debug = False) -> None:
    """Print all about one document of the store as JSON. Its "file" can be given to keepkv ask.

    $ keepkv store show report.txt
    $ keepkv ask "$(keepkv store show report.txt | jq -r .file)" "Who signed it?"
    """
    from keepkv.documents.format import Contents
    from keepkv.documents.store import Store

    with Store.open(folder) as shelf:
        entry = shelf.find(key)
    hidden = ("tensors", "layers", "heads")
    header = {name: value for name, value in Contents(entry.file).header.items() if name not in hidden}
    if isinstance(report := header.get("report"), dict):
        header["report"] = {name: value for name, value in report.items() if name not in hidden}
    typer.echo(json.dumps({**entry.to_dict(), **header}, ensure_ascii=False, indent=1))


@command(store)
def rm(
    keys: Annotated[list[str], argument(f"{KEY_HELP} May be given several times.", "KEY...")],
    folder: Folder = None,
    debug: Debug = False,
) -> None:
    """Remove documents from the store. Processes that have one open can go on using it.

    $ keepkv store rm report.txt
    $ keepkv store rm 3f9a01c2 77be
    """
    from keepkv.documents.store import Store

    with Store.open(folder) as shelf:
        for entry in [shelf.find(key) for key in keys]:
            shelf.remove(entry.key)
            err.print(f"removed {entry.key[:12]} {entry.source}")


@command(store)
def gc(
    limit: Annotated[
        str,
        option(
            'Bytes that the store may hold ("10GB"). The least recently used documents are removed.',
            "SIZE",
            STORE,
            show_default=False,
        ),
    ] = "",
    folder: Folder = None,
    debug: Debug = False,
) -> None:
    """Clean up the store: unfinished files, entries without a file, and documents beyond a limit.

    $ keepkv store gc
    $ keepkv store gc --limit 10GB
    """
    from keepkv.documents.store import Store, bytes_of
    from keepkv.render import size

    with Store.open(folder) as shelf:
        removed, adopted = shelf.collect(bytes_of(limit) if limit else None)
        remaining = shelf.entries()
    err.print(
        f"removed {len(removed)} ({size(sum(entry.bytes for entry in removed))}), added {adopted} files without an entry, "
        f"left {len(remaining)} ({size(sum(entry.bytes for entry in remaining))})"
    )


def targets(docs: Sequence[str], output: Path | None) -> list[Path]:
    """The file each document is compiled to. Raises InputError where two would be one, or a folder is not there."""
    if not docs:
        raise InputError("nothing to compile: give at least one text file")
    stems = [Path("document" if doc == "-" else doc).with_suffix(SUFFIX) for doc in docs]
    if output is None:
        files = stems
    elif len(docs) == 1 and not output.is_dir() and (output.suffix or output.exists()):
        files = [output]
    else:
        if output.exists() and not output.is_dir():
            raise InputError(f"{str(output)!r} is a file, and there are {len(docs)} documents: give a folder")
        output.mkdir(parents=True, exist_ok=True)
        files = [output / stem.name for stem in stems]
    if len(set(files)) < len(files):
        duplicate = next(file for file in files if files.count(file) > 1)
        raise InputError(f"two documents would be written to {str(duplicate)!r}: compile them into different folders")
    for file in files:
        if file.is_dir() or not file.parent.is_dir():
            raise InputError(f"{str(file)!r} cannot be written: expected a file name in a folder that exists")
        if str(file) in docs and file.suffix == SUFFIX:
            raise InputError(f"{str(file)!r} is compiled already: give the text it was made of")
        if str(file) in docs:
            raise InputError(f"the compiled document would overwrite its text {str(file)!r}: give another file with -o")
    return files
