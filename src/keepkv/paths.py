"""Where keepkv keeps its files, what they are called, and how they are written: whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIX = ".keep"


def cache_folder() -> Path:
    """$KEEPKV_CACHE, or keepkv under $XDG_CACHE_HOME, or ~/.cache/keepkv."""
    own = os.environ.get("KEEPKV_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "keepkv"


def models_folder() -> Path:
    """Where `make models` puts the models that keepkv is measured on, a folder each; `--model NAME` looks there."""
    return cache_folder() / "models"


def texts_folder() -> Path:
    """Where `make texts` puts the texts that keepkv is measured on, a folder each."""
    return cache_folder() / "texts"


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yields a path beside `file` to write to. When the block ends, what was written replaces `file`, whole or not at all.

    This holds whenever the process or the machine stops: the new file is flushed to the disk (fsync), renamed over the old
    one, and then the folder is flushed. If the block raises, `file` stays as it was and the temporary file is removed. A
    process that is killed leaves a temporary file named `.{file name}.*.tmp` behind. Raises OSError.
    """
    file = file.resolve()  # of a link, the file that it points to is replaced
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(file))
    number, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
    os.close(number)
    scratch = Path(name)
    scratch.unlink()  # whoever writes makes it anew, with the rights that new files have
    try:
        yield scratch
        if file.exists():
            shutil.copymode(file, scratch)
        flush(scratch)
        scratch.replace(file)
        flush(file.parent)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder beside `folder` to fill. When the block ends, it is flushed to the disk and renamed to `folder`.

    If another process has made `folder` meanwhile, that one stays: both must be worth the same. Raises OSError.
    """
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        yield scratch
        for path in (*scratch.rglob("*"), scratch):
            flush(path)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        flush(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def flush(path: Path) -> None:
    """Asks the system to have a file, or the names in a folder, on the disk before going on."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
