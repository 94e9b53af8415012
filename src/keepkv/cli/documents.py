"""The commands around compiled documents: compile, store, and what `ask` does with .keep files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keepkv.cli.options import (
    DEFAULT,
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
    checked,
)
from keepkv.cli.progress import bar, err
from keepkv.errors import InputError
from keepkv.paths import SUFFIX
from keepkv.recipe import Recipe

if TYPE_CHECKING:
    from keepkv.documents.store import Entry


Docs = Annotated[list[str], typer.Argument(metavar="DOC...", help="Text files, or - for standard input.", show_default=False)]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--store", envvar="KEEPKV_STORE", help="The store's folder; by default in keepkv's cache.", show_default=False
    ),
]
Key = Annotated[str, typer.Argument(help="A key, the beginning of one, or a source's name.", show_default=False)]
store = typer.Typer(
    no_args_is_help=True, help="Compiled documents in a folder: found by what they are, bounded in bytes, shared by processes."
)


def compile(
    docs: Docs,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="A file, or a folder for several. Default: DOC.keep", show_default=False),
    ] = None,
    budget: Budget = DEFAULT.budget_text,
    method: Method = DEFAULT.method_name,
    slot_dtype: SlotDtype = DEFAULT.slot_dtype,
    repeat: Repeat = DEFAULT.repeat,
    keep: Keep = None,
    chunk: Chunk = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Keep every key and value too: joined documents can then be repaired (--repair).")
    ] = False,
    ids: Annotated[
        bool, typer.Option("--ids/--no-ids", help="Whether the file holds the text's tokens (the text can be read from them).")
    ] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave files alone that were made of the same text in the same way.")
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Compile side by side on a Ray cluster ($RAY_ADDRESS, or this machine's cores).")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="With --ray: how many at once, each with the model in memory.")] = 2,
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = DEFAULT.seed,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read documents once and write their compact caches as .keep files, to be asked at any time.

    [bold]keepkv compile report.txt && keepkv ask report.keep "Who signed it?"[/bold]

    [bold]keepkv compile chapters/*.txt -o compiled --budget 5% --resume[/bold]

    [bold]keepkv compile library/*.txt -o compiled --ray --workers 8 --resume[/bold]
    """
    from keepkv.cli.console import line_of

    outputs = targets(docs, output)
    if ray and "-" in docs:
        raise InputError("--ray compiles files: standard input is read by no worker")
    told: list[dict[str, Any]] = []
    failed: list[tuple[str, str]] = []
    with bar(f"loading {model}") as line:
        from keepkv.documents.batch import Compiler, Order, with_ray

        recipe = checked(Recipe(budget, method, slot_dtype, repeat, tuple(keep or ()), chunk=chunk, seed=seed, exact=exact))
        order = Order(recipe, ids, resume, model, device, dtype)
        if ray:
            progress = line.phase(f"compiling with {workers} workers")
            for number, (doc, facts) in enumerate(with_ray(docs, outputs, order, workers, 1.0 if "cuda" in device else 0.0)):
                progress(number + 1, len(docs))
                if isinstance(facts, str):
                    failed.append((doc, facts))
                else:
                    told.append(facts)
        else:
            compiler = Compiler(order)
            for number, (doc, target) in enumerate(zip(docs, outputs, strict=True)):
                count = f"{number + 1}/{len(docs)} {doc}: " if len(docs) > 1 else ""
                told.append(compiler.compile(doc, target, line.counted(count)))
    for facts in told:
        if warning := facts.pop("warning"):
            err.print(f"[yellow]warning:[/yellow] {facts['source']}: {warning}")
        typer.echo(json.dumps(facts, ensure_ascii=False) if as_json else line_of(facts))
    for doc, why in failed:
        err.print(f"[red]{doc}:[/red] {why}")
    if failed:
        raise InputError(f"{len(failed)} of {len(docs)} documents could not be compiled")


@store.command()
def add(
    docs: Docs,
    folder: Folder = None,
    budget: Budget = DEFAULT.budget_text,
    method: Method = DEFAULT.method_name,
    slot_dtype: SlotDtype = DEFAULT.slot_dtype,
    repeat: Repeat = DEFAULT.repeat,
    keep: Keep = None,
    chunk: Chunk = None,
    exact: Annotated[bool, typer.Option("--exact", help="Keep every key and value too, for --repair.")] = False,
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = DEFAULT.seed,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile documents into the store; what is there already, by text, model and recipe, is left as it is.

    [bold]keepkv store add handbook.txt minutes/*.txt --budget 5%[/bold]
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
            _say([entry], as_json, "added" if new else "there already")


@store.command("list")
def list_(folder: Folder = None, as_json: Json = False, debug: Debug = False) -> None:
    """List what the store holds, the most recently used first."""
    from keepkv.documents.store import Store

    with Store.open(folder) as shelf:
        entries = shelf.entries()
    if as_json:
        typer.echo(json.dumps([entry.to_dict() for entry in entries], ensure_ascii=False))
    elif entries:
        from keepkv.cli.console import show_entries

        show_entries(entries)
    else:
        err.print("the store is empty: keepkv store add report.txt")


@store.command()
def show(key: Key, folder: Folder = None, debug: Debug = False) -> None:
    """Show all that is known of one entry, as JSON; `file` is what keepkv ask can be given.

    [bold]keepkv ask "$(keepkv store show report.txt | jq -r .file)" "Who signed it?"[/bold]
    """
    from keepkv.documents.format import Contents
    from keepkv.documents.store import Store

    with Store.open(folder) as shelf:
        entry = shelf.find(key)
    header = dict(Contents(entry.file).header)
    header.pop("tensors"), header.pop("layers"), header["report"].pop("heads")
    typer.echo(json.dumps({**entry.to_dict(), **header}, ensure_ascii=False, indent=1))


@store.command()
def rm(
    keys: Annotated[list[str], typer.Argument(help="Keys, beginnings of keys, or sources' names.", show_default=False)],
    folder: Folder = None,
    debug: Debug = False,
) -> None:
    """Remove entries. Who is just using one is not disturbed."""
    from keepkv.documents.store import Store

    with Store.open(folder) as shelf:
        for entry in [shelf.find(key) for key in keys]:
            shelf.remove(entry.key)
            err.print(f"removed {entry.key[:12]} {entry.source}")


@store.command()
def gc(
    limit: Annotated[str, typer.Option(help='Bytes the store may hold ("10GB"); the least recently used go.')] = "",
    folder: Folder = None,
    debug: Debug = False,
) -> None:
    """Clean up: unfinished files of stopped processes, entries without a file, and what is beyond a limit.

    [bold]keepkv store gc --limit 10GB[/bold]
    """
    from keepkv.documents.store import Store, bytes_of
    from keepkv.render import size

    with Store.open(folder) as shelf:
        gone, adopted = shelf.collect(bytes_of(limit) if limit else None)
        left = shelf.entries()
    err.print(
        f"removed {len(gone)} ({size(sum(entry.bytes for entry in gone))}), found again {adopted}, "
        f"left {len(left)} ({size(sum(entry.bytes for entry in left))})"
    )


def _say(entries: list[Entry], as_json: bool, what: str) -> None:
    for entry in entries:
        typer.echo(json.dumps(entry.to_dict()) if as_json else f"{entry.key[:12]} {what}: {entry.source}")


def targets(docs: Sequence[str], output: Path | None) -> list[Path]:
    """The file each document is compiled to. Raises InputError where two would be one, or a folder is not there."""
    if not docs:
        raise InputError("nothing to compile: give at least one text file")
    stems = [Path("document" if doc == "-" else doc).with_suffix(SUFFIX) for doc in docs]
    if output is None:
        found = stems
    elif len(docs) == 1 and not output.is_dir():
        found = [output]
    else:
        if output.exists() and not output.is_dir():
            raise InputError(f"{str(output)!r} is a file, and there are {len(docs)} documents: give a folder")
        if len(docs) > 1:
            output.mkdir(parents=True, exist_ok=True)
        found = [output / stem.name for stem in stems]
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise InputError(f"two documents would be written to {str(twice)!r}: compile them into different folders")
    for name in found:
        if name.is_dir() or not name.parent.is_dir():
            raise InputError(f"{str(name)!r} cannot be written: expected a file name in a folder that exists")
        if str(name) in docs:
            raise InputError(f"{str(name)!r} is compiled already: give the text it was made of")
    return found
