"""A store: a folder of .keep files with an SQLite index. The files are the truth; the index can be made from them again.

An entry is written to a temporary file, renamed into place, then indexed: whatever stops in between, what was finished is
found again (`collect`). A removal deletes the file first and then its line. Who has a file open goes on reading it.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv import paths
from keepkv.budget import Budget
from keepkv.documents import format, identity
from keepkv.documents.document import Document, compile_text, key_of, load, save, shortened
from keepkv.errors import InputError
from keepkv.recipe import Recipe
from keepkv.text.prompt import Prompt
from keepkv.text.reading import Phase, silent

_STALE = 3600  # seconds after which a temporary file belongs to nobody
_PATIENCE = 60.0  # seconds that a process waits for the others' writing
_BLOCK = 64  # tokens: where prefixes within an exact tail can be found
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, source TEXT, model TEXT, method TEXT, budget TEXT, exact INTEGER,
    tokens INTEGER, bytes INTEGER, created REAL, used REAL);
CREATE TABLE IF NOT EXISTS prefixes (digest TEXT, length INTEGER, family TEXT, key TEXT, PRIMARY KEY (digest, key));
CREATE INDEX IF NOT EXISTS lengths ON prefixes (family, length);
"""


@dataclass(frozen=True)
class Entry:
    """A line of the index. key: the digest of text, model and recipe; bytes: of the file; created, used: seconds since 1970."""

    key: str
    source: str
    model: str
    method: str
    budget: str
    exact: bool
    tokens: int
    bytes: int
    created: float
    used: float
    folder: str = ""

    @property
    def file(self) -> Path:
        return Path(self.folder) / f"{self.key}{paths.SUFFIX}"

    def to_dict(self) -> dict[str, Any]:
        told = asdict(self)
        told.pop("folder")
        return {**told, "file": str(self.file)}


_COLUMNS = tuple(field.name for field in fields(Entry) if field.name != "folder")


class Store:
    """Entries of one folder. Safe for several processes and threads at once; `close` it, or use it in a with statement."""

    def __init__(self, folder: Path) -> None:
        """Opens or makes a store. Raises InputError if the folder cannot be used."""
        self.folder, self._alone = folder, threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._index = sqlite3.connect(
                folder / "index.sqlite3", timeout=_PATIENCE, isolation_level=None, check_same_thread=False
            )
            self._index.execute("PRAGMA journal_mode=WAL")
            with self._writing() as index:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    index.execute(statement)
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"the store {str(folder)!r} cannot be used: {error}") from error

    @staticmethod
    def open(folder: Path | None = None) -> Store:
        """The store of a folder, by default the one in keepkv's cache folder."""
        return Store(folder or paths.cache_folder() / "store")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._index.close()

    def for_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "") -> Shelf:
        """The store as one model sees it: it can add and load documents."""
        return Shelf(self, model, tokenizer, name)

    def entries(self) -> list[Entry]:
        """All entries, the most recently used first."""
        return self._select("ORDER BY used DESC, key")

    def find(self, key: str) -> Entry:
        """The one entry of that key, beginning of a key, source, or source's name. Raises InputError if none or several."""
        found = [entry for entry in self.entries() if key in (entry.source, Path(entry.source).name)]
        if re.fullmatch("[0-9a-f]{4,64}", key):
            found = self._select("WHERE key LIKE ? || '%'", key) or found
        if not found:
            raise InputError(f"the store holds no {key!r}: keepkv store list shows what it holds")
        if len(found) > 1:
            keys = ", ".join(f"{entry.key[:12]} ({entry.method} {entry.budget})" for entry in found)
            raise InputError(f"{key!r} is several entries: give one of the keys {keys}")
        return found[0]

    def remove(self, key: str) -> None:
        """Removes an entry; nothing happens if it is gone already."""
        (self.folder / f"{key}{paths.SUFFIX}").unlink(missing_ok=True)
        with self._writing() as index:
            index.execute("DELETE FROM entries WHERE key = ?", (key,))
            index.execute("DELETE FROM prefixes WHERE key = ?", (key,))

    def collect(self, limit: float | None = None) -> tuple[list[Entry], int]:
        """Puts the store in order: adopts finished files that nobody indexed, forgets entries without a file, deletes what
        stopped processes left and, with a limit in bytes, the least recently used. Returns what went, and how many it adopted.
        """
        known = {entry.key: entry for entry in self.entries()}
        adopted = 0
        for file in self.folder.glob(f"*{paths.SUFFIX}"):
            if file.stem not in known:
                with suppress(InputError):  # a newer keepkv's, damaged from outside, or gone just now: not ours to delete
                    adopted += self._enter(file)[1]
        for file in self.folder.glob(".*.tmp"):
            with suppress(FileNotFoundError):  # finished just now
                if time.time() - file.stat().st_mtime > _STALE:
                    file.unlink()
        gone = [entry for entry in known.values() if not entry.file.exists()]
        if limit is not None:
            held = 0
            for entry in self.entries():
                held += entry.bytes
                if held > limit and entry.file.exists():
                    gone.append(entry)
        for entry in gone:
            self.remove(entry.key)
        return gone, adopted

    def _enter(self, file: Path) -> tuple[Entry, bool]:
        """Indexes a finished file; its entry, and whether it was not indexed yet."""
        contents = format.Contents(file)
        header, now = contents.header, time.time()
        try:
            recipe, key = header["recipe"], file.stem
            entry = Entry(
                key, header["source"], header["model"]["name"], recipe["method"], recipe["budget"], bool(recipe["exact"]),
                int(header["seen"]), file.stat().st_size, now, now, str(self.folder),
            )  # fmt: skip
            family = _family(header["model"], header["tokenizer"])
            ids = contents.take("ids", 1, int(header["seen"]), dtype=torch.int32)[0].tolist()
            tail = contents.take(f"layer.{_first(header)}.keys", 1, None, None, None).shape[2]
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise contents.broken("its header does not describe an entry of a store") from error
        lengths = [*range(len(ids) - tail, len(ids), _BLOCK), len(ids)]
        with self._writing() as index:
            told = [getattr(entry, name) for name in _COLUMNS]
            new = index.execute(f"INSERT OR IGNORE INTO entries VALUES ({','.join('?' * len(told))})", told).rowcount > 0
            for length, found in zip(lengths, prefix_digests(ids, lengths), strict=True):
                if length:
                    index.execute("INSERT OR IGNORE INTO prefixes VALUES (?, ?, ?, ?)", (found, length, family, key))
        return entry, new

    def _select(self, rest: str, *values: object) -> list[Entry]:
        rows = self._index.execute(f"SELECT {', '.join(_COLUMNS)} FROM entries {rest}", values).fetchall()
        told = [dict(zip(_COLUMNS, row, strict=True)) for row in rows]
        return [Entry(**{**row, "exact": bool(row["exact"])}, folder=str(self.folder)) for row in told]

    def _touch(self, key: str) -> None:
        with self._writing() as index:
            index.execute("UPDATE entries SET used = ? WHERE key = ?", (time.time(), key))

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Cursor]:
        """One transaction, alone: all of it happens or nothing."""
        with self._alone, closing(self._index.cursor()) as index:
            index.execute("BEGIN IMMEDIATE")
            try:
                yield index
            except BaseException:
                index.execute("ROLLBACK")
                raise
            index.execute("COMMIT")


class Shelf:
    """A store as one model sees it. limit: bytes; whenever something is added, the least recently used go beyond that."""

    def __init__(
        self,
        store: Store,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "",
        limit: float | None = None,
    ) -> None:
        self.store, self.model, self.tokenizer, self.name, self.limit = store, model, tokenizer, name, limit
        self.known, self.cut = identity.of_model(model), identity.of_tokenizer(tokenizer)

    def add(self, text: str, recipe: Recipe | None = None, source: str = "", phase: Phase = silent) -> tuple[Entry, bool]:
        """Compiles a text into the store; the entry, and whether it is new: what is there already is not compiled again."""
        ids = Prompt(self.tokenizer, text).text
        recipe = (recipe or Recipe()).settled(ids.shape[1])
        key = self.key(ids, recipe)
        found = self.store._select("WHERE key = ?", key)
        if found and found[0].file.exists():
            self.store._touch(key)
            return found[0], False
        document = compile_text(self.model, self.tokenizer, text, recipe, source, self.name, phase)
        return self.put(document), True

    def put(self, document: Document) -> Entry:
        """Adds a document that was compiled, or went on being read since. Raises InputError without its token ids."""
        if document.ids is None:
            raise InputError("the store finds documents by their tokens: this one was saved without (--no-ids)")
        key = self.key(document.ids, document.recipe)
        file = self.store.folder / f"{key}{paths.SUFFIX}"
        save(document, file, self.known, self.cut)
        entry, _new = self.store._enter(file)
        self.store._touch(key)
        if self.limit is not None:
            self.store.collect(self.limit)
        return entry

    def get(self, key: str) -> Document | None:
        """An entry's document, mapped into memory, or None if it is not there, or was removed just now."""
        file = self.store.folder / f"{key}{paths.SUFFIX}"
        if not file.exists():
            return None
        try:
            document = load(file, self.model, self.cut, self.known)
        except InputError:
            if file.exists():
                raise
            return None
        self.store._touch(key)
        return document

    def ask_for(self, text: str, recipe: Recipe | None = None, source: str = "", phase: Phase = silent) -> Document:
        """A text's document, out of the store if it is there, compiled into it otherwise."""
        for _ in range(3):  # another process may remove it between the two steps
            entry, _new = self.add(text, recipe, source, phase)
            document = self.get(entry.key)
            if document is not None:
                return document
        raise InputError("the store loses what is added to it: is its limit smaller than one document?")

    def longest(self, ids: Tensor, recipe: Recipe | None = None) -> tuple[Document, int] | None:
        """The document that shares the longest prefix with a prompt ids [1, T], and the prefix's length; None if none does.

        Compact parts are used whole or not at all; within an exact tail any number of tokens can be shared, and the document is
        returned without the others. At least one token is left to be read. recipe: only documents that were compiled so.
        """
        asked = ids.flatten().tolist()
        family = _family(self.known, self.cut)
        rows = self.store._index.execute(
            "SELECT DISTINCT length FROM prefixes WHERE family = ? AND length <= ? ORDER BY length", (family, len(asked))
        ).fetchall()
        lengths = [length for (length,) in rows]
        best: tuple[Document, int] | None = None
        for digest in reversed(prefix_digests(asked, lengths)):
            for (key,) in self.store._index.execute("SELECT key FROM prefixes WHERE digest = ?", (digest,)).fetchall():
                document = self.get(key)
                if document is None or document.ids is None:
                    continue
                if recipe is not None and recipe.settled(document.ids.shape[1]) != document.recipe:
                    continue
                own = document.ids[0].tolist()
                same = next((i for i, (a, b) in enumerate(zip(own, asked, strict=False)) if a != b), min(len(own), len(asked)))
                same = min(same, len(asked) - 1)
                first = document.tokens - document.cache.keep_layers[0].tail
                if same >= max(1, first) and (best is None or same > best[1]) and _can_end(document, same):
                    best = shortened(document, same), same
            if best is not None:
                return best
        return best

    def key(self, ids: Tensor, recipe: Recipe) -> str:
        return key_of(recipe, ids, {**self.known, "tokenizer": self.cut})


def prefix_digests(ids: list[int], lengths: list[int]) -> list[str]:
    """SHA-256 of ids[:n] for every n of ascending lengths, in one pass."""
    total, done, found = hashlib.sha256(), 0, []
    for length in lengths:
        total.update(b"".join(token.to_bytes(4, "little") for token in ids[done:length]))
        done = length
        found.append(total.copy().hexdigest())
    return found


def bytes_of(limit: str) -> float:
    """Bytes from "10GB". Raises BudgetError, InputError."""
    budget = Budget.parse(limit)
    if budget.kind != "bytes":
        raise InputError(f'the limit {limit!r} is not in bytes: expected "10GB" or "500MB"')
    return budget.amount


def _can_end(document: Document, tokens: int) -> bool:
    """Whether the cache can go back to so many tokens: sliding windows that have moved on cannot."""
    whole = len(document.cache.keep_layers) == len(document.cache.layers)
    return tokens == document.tokens or whole


def _family(model: Mapping[str, Any], tokenizer: str) -> str:
    """What prefixes have in common that may be continued by the same model."""
    return identity.digest(repr(sorted((k, v) for k, v in {**model, "tokenizer": tokenizer}.items() if k != "name")).encode())


def _first(header: Mapping[str, Any]) -> int:
    """The first layer with full attention."""
    return next(i for i, layer in enumerate(header["layers"]) if "slots" in layer)
