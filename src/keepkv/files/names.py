"""Names and lines: where compiled documents are written to, and how entries are listed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from keepkv.errors import InputError

if TYPE_CHECKING:
    from keepkv.files.store import Entry

SUFFIX = ".keep"


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


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Compiled documents, the leading arguments that end in .keep, and the rest: questions."""
    count = next((i for i, argument in enumerate(arguments) if not argument.endswith(SUFFIX)), len(arguments))
    return list(arguments[:count]), list(arguments[count:])


def line_of(facts: Mapping[str, Any]) -> str:
    """One line about a compiled file."""
    from keepkv.console import size

    smaller = facts["kv_bytes_full"] / max(1, facts["kv_bytes"])
    seconds = facts["compress_seconds"] + facts["repeat_seconds"]
    how = f"read in {facts['reading_seconds']:.1f} s, compressed in {seconds:.1f} s" if facts["made"] else "was there already"
    return (
        f"{facts['file']}: {facts['tokens']:,} tokens, cache {size(facts['kv_bytes'])} instead of "
        f"{size(facts['kv_bytes_full'])} ({smaller:.1f}x), file {size(facts['bytes'])}, {how}"
    )


def show_entries(entries: Sequence[Entry]) -> None:
    """A table of entries: key, source, tokens, bytes, recipe, and how long ago each was used."""
    from keepkv.console import out, size

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, justify in (("key", "left"), ("source", "left"), ("tokens", "right"), ("size", "right"), ("recipe", "left")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    table.add_column("used", justify="right")
    for entry in entries:
        recipe = f"{entry.method} {entry.budget}{' exact' if entry.exact else ''}"
        table.add_row(entry.key[:12], Path(entry.source).name, f"{entry.tokens:,}", size(entry.bytes), recipe, _ago(entry.used))
    out.print(table)


def _ago(then: float) -> str:
    seconds = max(0.0, time.time() - then)
    for name, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {name} ago"
    return "now"
