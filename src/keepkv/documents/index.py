"""The store's index: an SQLite file that is made anew where it is damaged, and only read where it cannot be written."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "index.sqlite3"
_PATIENCE = 60.0  # seconds that a process waits while others write
_ABOUT_THE_DISK = ("readonly", "unable to open", "disk I/O", "is full")  # in an error; others are about what the index holds
_KINDS = (
    ("key", "text"), ("source", "text"), ("model", "text"), ("method", "text"), ("budget", "text"), ("exact", "integer"),
    ("tokens", "integer"), ("bytes", "integer"), ("created", "real"), ("used", "real"),
)  # fmt: skip
_TABLES = (
    f"CREATE TABLE IF NOT EXISTS entries ({', '.join(f'{name} {kind}' for name, kind in _KINDS)}, PRIMARY KEY (key))",
    "CREATE TABLE IF NOT EXISTS prefixes (digest TEXT, length INTEGER, family TEXT, key TEXT, PRIMARY KEY (digest, key))",
    "CREATE INDEX IF NOT EXISTS lengths ON prefixes (family, length)",
)
_COLUMNS = (
    f"SELECT {', '.join(name for name, _ in _KINDS)} FROM entries",
    "SELECT digest, length, family, key FROM prefixes",
)


def opened(folder: Path) -> tuple[sqlite3.Connection, bool, bool]:
    """Opens a store's index.

    Args:
        folder: The store's.

    Returns:
        The index, whether the store can only be read, and whether the index is new, so that the files have still to be entered.

    Raises:
        OSError, sqlite3.Error: if there is no way to use it.
    """
    file = folder / FILE
    if not os.access(folder, os.R_OK | os.X_OK):
        raise OSError(f"{folder} cannot be read")
    if file.exists() and not file.is_file():
        raise OSError(f"{FILE} is not a regular file")
    try:
        connection, new = _connected(file)
        return connection, False, new
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            raise
        if any(word in str(error) for word in _ABOUT_THE_DISK):
            return _read_only(file)
    except UnicodeDecodeError:  # of a message that quotes what is damaged
        pass
    try:
        return _made_again(file), False, True  # the files are entered again in any case
    except (OSError, sqlite3.Error):  # a full disk, or one that cannot be written
        return _read_only(file)


def _connected(file: Path) -> tuple[sqlite3.Connection, bool]:
    """The index, for reading and writing, and whether it was not there. Raises sqlite3.Error, also for a damaged one."""
    connection = sqlite3.connect(file, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
    connection.text_factory = _text
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("BEGIN IMMEDIATE")
        tables = connection.execute("SELECT count(*) FROM sqlite_master WHERE name IN ('entries', 'prefixes')").fetchone()
        for statement in _TABLES:
            connection.execute(statement)
        _check(connection)
        connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection, tables != (2,)


def _check(connection: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError for an index that is damaged, or that no store has made."""
    found = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != ("ok",):
        raise sqlite3.DatabaseError(f"the index is malformed ({found})")
    for columns in _COLUMNS:
        connection.execute(f"{columns} LIMIT 1").fetchall()
    kinds = [f"typeof({name}) != '{kind}'" for name, kind in _KINDS]
    wrong = " OR ".join([*kinds, "length(key) != 64", "key GLOB '*[^0-9a-f]*'", "tokens < 1", "bytes < 0"])
    if connection.execute(f"SELECT 1 FROM entries WHERE {wrong} LIMIT 1").fetchone():
        raise sqlite3.DatabaseError("the index is malformed (values that no store has written)")


def _made_again(file: Path) -> sqlite3.Connection:
    """A new index in place of a damaged one. Of several processes that find the damage, one makes it. Raises as `opened`."""
    with _alone(file.parent):
        try:
            return _connected(file)[0]
        except (sqlite3.DatabaseError, UnicodeDecodeError):
            for suffix in ("", "-wal", "-shm", "-journal"):
                file.with_name(FILE + suffix).unlink(missing_ok=True)
            return _connected(file)[0]


def _read_only(file: Path) -> tuple[sqlite3.Connection, bool, bool]:
    """The index as it is or, where it cannot be read, one in memory."""
    for how in ("mode=ro", "mode=ro&immutable=1"):
        connection = None
        try:
            connection = sqlite3.connect(
                f"{file.resolve().as_uri()}?{how}", uri=True, isolation_level=None, check_same_thread=False
            )
            connection.text_factory = _text
            _check(connection)
            return connection, True, False
        except (sqlite3.Error, UnicodeDecodeError):
            if connection is not None:
                connection.close()
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    for statement in _TABLES:
        connection.execute(statement)
    return connection, True, True


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While this process mends the index, no other does. Raises OSError."""
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)
