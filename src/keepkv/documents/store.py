"""Store: a folder of .keep files with an SQLite index. The files are the truth: a damaged index is made from them again.

An entry is written to a temporary file, renamed into place, and then indexed: if the process stops in between, a finished
file is adopted later (`Store.collect`). A removal deletes the file first, and then its line in the index. A process that has
a file open can go on reading it. A store that cannot be written is read: what was used when is then not noted.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv import paths, schema
from keepkv.budget import Budget
from keepkv.documents import index
from keepkv.documents.document import Document, compile_text, key_of, load, save, shortened
from keepkv.documents.format import MOST_TOKENS, Contents
from keepkv.errors import BudgetError, InputError
from keepkv.models import identity
from keepkv.recipe import Recipe
from keepkv.text.prompt import Prompt, same_prefix
from keepkv.text.reading import Phase, silent

_KEY = re.compile("[0-9a-f]{64}")  # nothing else becomes part of a path
_BLOCK = 64  # tokens between the prefixes that are indexed within an exact tail


@dataclass(frozen=True)
class Entry:
    """A line of the index. Only its owner can read a folder that a store makes, and the files in it.

    Attributes:
        key: The digest of text, model and recipe.
        source, model, method, budget: Of the document.
        exact: Whether it keeps every key and value.
        tokens: Of its text.
        bytes: Of its file.
        created, used: Seconds since 1970.
        folder: The store's.
    """

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
        """The document's file."""
        return Path(self.folder) / f"{self.key}{paths.SUFFIX}"

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, for JSON, and the file in place of its folder."""
        values = asdict(self)
        values.pop("folder")
        return {**values, "file": str(self.file)}


_COLUMNS = tuple(field.name for field in fields(Entry) if field.name != "folder")


class Store:
    """Compiled documents in one folder. Safe for several processes and threads at once.

    `close` it, or use it in a with statement.

    Args:
        folder: Made if it is not there, for its owner only.

    Attributes:
        read_only: Whether documents can only be taken out of it.

    Raises:
        InputError: if the folder cannot be used.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Store(Path(folder)) as store:
        ...     store.entries()
        []
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self.read_only = False
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            self._index, self.read_only, new = index.opened(folder)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error
        if new:
            self._adopt(set())

    @staticmethod
    def open(folder: Path | None = None) -> Store:
        """The store of a folder, by default the one in keepkv's cache folder."""
        return Store(folder or paths.cache_folder() / "store")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the index. Documents that were loaded stay usable."""
        self._index.close()

    def for_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "") -> Shelf:
        """The store as one model sees it: it can add and load documents."""
        return Shelf(self, model, tokenizer, name)

    def entries(self) -> list[Entry]:
        """All entries, the most recently used first."""
        return self._select("ORDER BY used DESC, key")

    def find(self, key: str) -> Entry:
        """The one entry of a key, of the beginning of a key (4 digits or more), of a source, or of a source's file name.

        Raises:
            InputError: if there is none, or several.
        """
        matches = [entry for entry in self.entries() if key in (entry.source, Path(entry.source).name)]
        if re.fullmatch("[0-9a-f]{4,64}", key):
            matches = self._select("WHERE key LIKE ? || '%'", key) or matches
        if not matches:
            raise InputError(f"the store holds no {key!r}: keepkv store list shows what it holds")
        if len(matches) > 1:
            keys = ", ".join(f"{entry.key[:12]} ({entry.method} {entry.budget})" for entry in matches)
            raise InputError(f"{key!r} is several entries: give one of the keys {keys}")
        return matches[0]

    def remove(self, key: str) -> None:
        """Removes an entry; nothing happens if it is gone already."""
        try:
            (self.folder / f"{key}{paths.SUFFIX}").unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        with self._writing() as cursor:
            cursor.execute("DELETE FROM entries WHERE key = ?", (key,))
            cursor.execute("DELETE FROM prefixes WHERE key = ?", (key,))

    def collect(self, limit: float | None = None) -> tuple[list[Entry], int]:
        """Puts the store in order.

        It adopts finished files that nobody indexed, forgets entries without a file, deletes what stopped processes left and,
        with a limit, the least recently used entries.

        Args:
            limit: Bytes that the store may hold; None: any number.

        Returns:
            The entries that were removed, and how many files were adopted.
        """
        if self.read_only:
            raise self._unusable("it can only be read")
        indexed = {entry.key: entry for entry in self.entries()}
        adopted = self._adopt(set(indexed))
        paths.remove_stale(self.folder)
        gone = [entry for entry in indexed.values() if not entry.file.exists()]
        if limit is not None:
            total = 0
            for entry in self.entries():
                total += entry.bytes
                if total > limit and entry.file.exists():
                    gone.append(entry)
        for entry in gone:
            self.remove(entry.key)
        return gone, adopted

    def _adopt(self, known: Set[str]) -> int:
        """Indexes finished files that are not known. Returns how many."""
        adopted = 0
        for file in sorted(self.folder.glob(f"*{paths.SUFFIX}")):
            if file.stem not in known:
                with suppress(InputError):  # a newer keepkv's, damaged from outside, or gone just now: not ours to delete
                    adopted += self._enter(file)[1]
        return adopted

    def _enter(self, file: Path) -> tuple[Entry, bool]:
        """Indexes a finished file. Returns its entry, and whether it was not indexed before. Raises InputError."""
        contents = Contents(file)
        header = contents.header
        try:
            recipe = Recipe.from_dict(schema.mapping(header["recipe"]))
            model = schema.mapping(header["model"])
            status = file.stat()
            entry = Entry(
                key=_key(file.stem),
                source=schema.text(header["source"]),
                model=schema.text(model["name"]),
                method=recipe.method_name,
                budget=recipe.budget_text,
                exact=recipe.exact,
                tokens=schema.whole(header["seen"], 1, MOST_TOKENS),
                bytes=status.st_size,
                created=status.st_mtime,
                used=status.st_mtime,
                folder=str(self.folder),
            )
            family = _family(model, schema.text(header["tokenizer"]))
            ids = contents.take("ids", 1, entry.tokens, dtype=torch.int32)[0].tolist()
            tail = contents.take(f"layer.{_first_full_attention(header)}.keys", 1, None, None, None).shape[2]
            if min(ids) < 0 or tail > len(ids):
                raise ValueError
        except (KeyError, ValueError, OSError) as error:
            raise contents.broken("its header does not describe an entry of a store") from error
        lengths = [*range(len(ids) - tail, len(ids), _BLOCK), len(ids)]
        with self._writing() as cursor:
            values = [getattr(entry, name) for name in _COLUMNS]
            new = cursor.execute(f"INSERT OR IGNORE INTO entries VALUES ({','.join('?' * len(values))})", values).rowcount > 0
            for length, digest in zip(lengths, prefix_digests(ids, lengths), strict=True):
                if length:
                    cursor.execute("INSERT OR IGNORE INTO prefixes VALUES (?, ?, ?, ?)", (digest, length, family, entry.key))
        return entry, new

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """What the index answers. Raises InputError."""
        try:
            return self._index.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _select(self, rest: str, *values: object) -> list[Entry]:
        rows = self._rows(f"SELECT {', '.join(_COLUMNS)} FROM entries {rest}", *values)
        try:
            return [_entry(dict(zip(_COLUMNS, row, strict=True)), self.folder) for row in rows]
        except ValueError as error:
            raise self._unusable(f"its index is damaged: {error}; remove {index.FILE}, which is made again") from error

    def _touch(self, key: str) -> None:
        """Notes that an entry was used just now. Where that cannot be written, it is not: what was asked for is there."""
        with suppress(InputError), self._writing() as cursor:
            cursor.execute("UPDATE entries SET used = ? WHERE key = ?", (time.time(), key))

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Cursor]:
        """One transaction, by one thread and one process at a time: all of it happens, or nothing. Raises InputError."""
        try:
            with self._lock, closing(self._index.cursor()) as cursor:
                cursor.execute("BEGIN IMMEDIATE")
                try:
                    yield cursor
                    cursor.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):  # a full disk has rolled back already
                        cursor.execute("ROLLBACK")
                    raise
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: object) -> InputError:
        reason = getattr(error, "strerror", None) or error
        return InputError(f"the store {str(self.folder)!r} cannot be used ({reason}): give a folder that can be written")


class Shelf:
    """One model's view of a store: it can add documents and load them.

    Args:
        store: The store.
        model: The model that compiles and asks.
        tokenizer: Its tokenizer.
        name: The name by which the model was loaded.
        limit: Bytes that the store may hold: whenever a document is added, the least recently used ones go. None: any number.
    """

    def __init__(
        self,
        store: Store,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "",
        limit: float | None = None,
    ) -> None:
        self.store = store
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.limit = limit
        self.model_id = identity.of_model(model)
        self.tokenizer_id = identity.of_tokenizer(tokenizer)

    def add(self, text: str, recipe: Recipe | None = None, source: str = "", phase: Phase = silent) -> tuple[Entry, bool]:
        """Compiles a text into the store, unless it is there already. One that is damaged there is compiled again.

        Args:
            text: The text.
            recipe: How it is compiled; by default as `Recipe` has it.
            source: Where it comes from, to be remembered.
            phase: Told what is under way.

        Returns:
            The entry, and whether it is new.

        Raises:
            KeepKVError: as `compile_text` and `save` do.
        """
        ids = Prompt(self.tokenizer, text).text
        recipe = (recipe or Recipe()).settled(ids.shape[1])
        key = self.key(ids, recipe)
        entries = self.store._select("WHERE key = ?", key)
        if entries and self._is_whole(entries[0]):
            self.store._touch(key)
            return entries[0], False
        document = compile_text(self.model, self.tokenizer, text, recipe, source, self.name, phase)
        return self.put(document), True

    def _is_whole(self, entry: Entry) -> bool:
        """Whether an entry's file is there as it was written; one that is not is removed."""
        try:
            Contents(entry.file).check()
        except InputError:
            self.store.remove(entry.key)
            return False
        return True

    def put(self, document: Document) -> Entry:
        """Adds a document that was compiled, or has read more since.

        Raises:
            InputError: for a document without its token ids.
        """
        if document.ids is None:
            raise InputError("the store finds documents by their tokens: this one was saved without (--no-ids)")
        key = self.key(document.ids, document.recipe)
        file = self.store.folder / f"{key}{paths.SUFFIX}"
        save(document, file, self.model_id, self.tokenizer_id)
        entry, _ = self.store._enter(file)
        self.store._touch(key)
        if self.limit is not None:
            self.store.collect(self.limit)
        return entry

    def get(self, key: str) -> Document | None:
        """An entry's document; None if it is not there, or was removed just now. Raises InputError for a damaged one."""
        file = self.store.folder / f"{key}{paths.SUFFIX}"
        if not _KEY.fullmatch(key) or not file.exists():
            return None
        try:
            document = load(file, self.model, self.tokenizer_id, self.model_id)
        except InputError:
            if file.exists():
                raise
            return None
        self.store._touch(key)
        return document

    def _sound(self, key: str) -> Document | None:
        """An entry's document; None also where it is damaged."""
        with suppress(InputError):
            return self.get(key)
        return None

    def ask_for(self, text: str, recipe: Recipe | None = None, source: str = "", phase: Phase = silent) -> Document:
        """A text's document: out of the store if it is there, compiled into it otherwise.

        Args:
            text: The text.
            recipe: How it is compiled; by default as `Recipe` has it.
            source: Where it comes from, to be remembered.
            phase: Told what is under way.

        Raises:
            InputError: if the store's limit is too small for one document.
            KeepKVError: as `compile_text` and `save` do.
        """
        for _ in range(3):  # another process may remove it between the two steps
            entry, _ = self.add(text, recipe, source, phase)
            document = self.get(entry.key)
            if document is not None:
                return document
        raise InputError("the store loses what is added to it: is its limit smaller than one document?")

    def longest(self, ids: Tensor, recipe: Recipe | None = None) -> tuple[Document, int] | None:
        """The document that shares the longest prefix with a prompt.

        Compact parts are shared whole or not at all. Of an exact tail any number of tokens can be shared, and the document is
        returned without the others. At least one token of the prompt is left to be read.

        Args:
            ids: The prompt's token ids [1, T].
            recipe: Only documents that were compiled so; None: any.

        Returns:
            The document and the number of tokens shared; None if no document shares any.
        """
        prompt = ids.flatten().tolist()
        family = _family(self.model_id, self.tokenizer_id)
        rows = self.store._rows(
            "SELECT DISTINCT length FROM prefixes WHERE family = ? AND length <= ? ORDER BY length", family, len(prompt)
        )
        lengths = [length for (length,) in rows]
        best: tuple[Document, int] | None = None
        for digest in reversed(prefix_digests(prompt, lengths)):
            for (key,) in self.store._rows("SELECT key FROM prefixes WHERE digest = ? AND family = ?", digest, family):
                document = self._sound(key)
                if document is None or document.ids is None:
                    continue
                settled = recipe and recipe.settled(document.ids.shape[1])
                if settled is not None and document.recipe.to_dict() != settled.to_dict():
                    continue
                same = min(same_prefix(document.ids[0].tolist(), prompt), len(prompt) - 1)
                compact = document.tokens - document.cache.keep_layers[0].tail
                if same >= max(1, compact) and (best is None or same > best[1]) and _can_end(document, same):
                    best = shortened(document, same), same
            if best is not None:
                return best
        return best

    def key(self, ids: Tensor, recipe: Recipe) -> str:
        """The key of a text's tokens [1, T], compiled with a recipe by this model."""
        return key_of(recipe, ids, {**self.model_id, "tokenizer": self.tokenizer_id})


def prefix_digests(ids: list[int], lengths: list[int]) -> list[str]:
    """SHA-256 of ids[:n] for every n of ascending lengths, in one pass."""
    total = hashlib.sha256()
    start = 0
    digests = []
    for length in lengths:
        total.update(b"".join(token.to_bytes(4, "little") for token in ids[start:length]))
        start = length
        digests.append(total.copy().hexdigest())
    return digests


def bytes_of(limit: str) -> float:
    """The number of bytes that "10GB" means. Raises InputError."""
    with suppress(BudgetError):
        budget = Budget.parse(limit)
        if budget.kind == "bytes":
            return budget.amount
    raise InputError(f'the limit {limit!r} is not a number of bytes: expected "10GB" or "500MB"')


def _can_end(document: Document, tokens: int) -> bool:
    """Whether the cache can go back to so many tokens: sliding windows that have moved on cannot."""
    whole = len(document.cache.keep_layers) == len(document.cache.layers)
    return tokens == document.tokens or whole


def _family(model: Mapping[str, Any], tokenizer: str) -> str:
    """A digest of model and tokenizer: prefixes that have it in common may be continued by the same model."""
    fields = {**model, "tokenizer": tokenizer}
    fields.pop("name", None)
    return identity.digest(json.dumps(fields, sort_keys=True).encode())


def _key(text: object) -> str:
    """A key, which is a digest. Raises ValueError."""
    if not _KEY.fullmatch(schema.text(text)):
        raise ValueError(f"{text!r} is no key")
    return str(text)


def _entry(line: Mapping[str, Any], folder: Path) -> Entry:
    """An entry of what the index holds. Raises ValueError for what no store has written."""
    entry = schema.dataclass_of(Entry, {**line, "exact": bool(line["exact"]), "folder": str(folder)})
    _key(entry.key)
    return entry


def _first_full_attention(header: Mapping[str, Any]) -> int:
    """The index of the first layer with full attention. Raises ValueError."""
    layers = schema.sequence(header["layers"])
    index = next((i for i, layer in enumerate(layers) if "slots" in schema.mapping(layer)), None)
    return schema.whole(index)
