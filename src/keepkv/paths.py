"""Where keepkv keeps its files, what they are called, and how they are read and written: whole or not at all."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SUFFIX = ".keep"
PRIVATE = 0o600  # the rights of files that hold what a user has read or said
STALE = 3600  # seconds after which a temporary file belongs to nobody


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


def open_file(file: Path, pipes: bool = False) -> int:
    """Opens a file for reading. Nothing that could be waited for without end is opened.

    Args:
        file: A regular file.
        pipes: Whether what this process has inherited (/dev/stdin, /dev/fd/63 of a shell's <(...)) may be a pipe or terminal.

    Returns:
        A file descriptor, to be closed by the caller.

    Raises:
        OSError: if it cannot be opened, or is a folder, a device or a named pipe.
    """
    try:
        number = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a name with a zero in it
        raise OSError(errno.EINVAL, str(error), str(file)) from None
    inherited = pipes and str(file).startswith(("/dev/std", "/dev/fd/", "/proc/self/fd/"))
    mode = os.fstat(number).st_mode
    if stat.S_ISDIR(mode) or not (stat.S_ISREG(mode) or inherited):
        os.close(number)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, os.strerror(number) if stat.S_ISDIR(mode) else "it is not a regular file", str(file))
    os.set_blocking(number, True)
    return number


def read_file(file: Path, pipes: bool = False, limit: int | None = None) -> bytes:
    """All bytes of a file, see `open_file`. Raises OSError, also for one of more than `limit` bytes."""
    with os.fdopen(open_file(file, pipes), "rb") as opened:
        data = opened.read() if limit is None else opened.read(limit + 1)
    if limit is not None and len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(file))
    return data


def write_file(file: Path, content: str | bytes, private: bool = False) -> None:
    """Writes a file whole or not at all, a text as UTF-8, see `atomic_file`. Raises OSError."""
    with atomic_file(file, private) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


def real(path: Path) -> Path:
    """Where a path leads in the end, links followed; for links in a circle, unlike `Path.resolve`, the path itself."""
    return Path(os.path.realpath(path))


@contextmanager
def atomic_file(file: Path, private: bool = False) -> Iterator[Path]:
    """Yields a path beside `file` to write to. When the block ends, what was written replaces `file`, whole or not at all.

    This holds whenever the process or the machine stops: the new file is flushed to the disk (fsync), renamed over the old
    one, and then the folder is flushed. If the block raises, `file` stays as it was and the temporary file is removed. A
    process that is killed leaves a temporary file named `.{file name}.*.tmp` behind, which the next one to write the same file
    removes when it is an hour old. Raises OSError.

    Args:
        file: What to write. It keeps its rights if it is there already.
        private: Whether a new file is for its owner only.
    """
    file = real(file)  # of a link, the file that it points to is replaced
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(file))
    _remove_stale(file)
    number, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
    os.close(number)
    scratch = Path(name)
    if not private:
        scratch.unlink()  # whoever writes makes it anew, with the rights that new files have
    try:
        yield scratch
        if file.exists():
            shutil.copymode(file, scratch)
        elif private:
            scratch.chmod(PRIVATE)  # also where the writer has made it anew
        flush(scratch)
        scratch.replace(file)
        flush(file.parent)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder beside `folder` to fill. When the block ends, it is flushed to the disk and renamed to `folder`.

    If another process has made `folder` meanwhile, that one stays: both must be worth the same. What a killed process leaves is
    removed as by `atomic_file`. Raises OSError.
    """
    _remove_stale(folder)
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


def remove_stale(folder: Path, pattern: str = ".*.tmp") -> None:
    """Removes what killed processes have left in a folder: temporary files and folders that nobody has touched for an hour."""
    for path in folder.glob(pattern):
        with suppress(OSError):  # finished just now, or not ours
            newest = max(place.lstat().st_mtime for place in (path, *path.rglob("*")))
            if time.time() - newest > STALE:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _remove_stale(file: Path) -> None:
    remove_stale(file.parent, f".{glob.escape(file.name)}.*.tmp")


def flush(path: Path) -> None:
    """Asks the system to have a file, or the names in a folder, on the disk before going on."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
