"""Records: one JSON line a question, written so that killing the process loses nothing but the variant under way."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from keepkv.errors import InputError

FILE = "records.jsonl"


class Key(NamedTuple):
    """What a record is about; two runs' records of equal keys and prompts are pairs."""

    model: str
    task: str
    length: int
    sample: int
    question: int
    method: str
    budget: str


@dataclass(frozen=True)
class Record:
    """One question, asked of one method's cache at one budget.

    length: what was asked for, 0 where a text is as it is; tokens: what was read. of: how many questions the sample has.
    prompt: SHA-256 of the text, the question and the answers, 16 digits. loglik: mean log-probability of a token of the
    expected answer. chances: of the expected and the wrong answers, in their order. measures: see the task. predicted:
    Report.error. seconds: reading, repeating, compressing, answering. failed: why there is no answer, if so.
    """

    model: str
    task: str
    length: int
    sample: int
    question: int
    method: str
    budget: str
    of: int = 1
    seed: int = 0
    prompt: str = ""
    ask: str = ""
    expected: str = ""
    answer: str = ""
    score: float = 0.0
    loglik: float | None = None
    chances: tuple[float, ...] = ()
    measures: dict[str, float] = field(default_factory=dict)
    depth: float | None = None
    tokens: int = 0
    slots: float = 0.0
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    predicted: float = 0.0
    fallbacks: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    failed: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""

    @property
    def key(self) -> Key:
        return Key(*(getattr(self, name) for name in Key._fields))

    @property
    def group(self) -> Key:
        """The key of all questions that were asked of the same cache."""
        return self.key._replace(question=0)

    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def load(folder: Path) -> list[Record]:
    """The whole records of a run, sorted by key; groups of which questions are missing are left out.

    A last line without an end is what a killed process leaves, and is left out. Raises InputError for other broken lines.
    """
    file = folder / FILE
    try:
        *lines, rest = file.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{str(folder)!r} is not a run: {FILE} cannot be read ({error.strerror})") from error
    del rest  # empty, or cut off
    known = {name.name for name in fields(Record)}
    groups: dict[Key, dict[int, Record]] = defaultdict(dict)
    for number, line in enumerate(lines, 1):
        try:
            found: dict[str, Any] = json.loads(line)
            found["chances"] = tuple(found.get("chances", ()))
            record = Record(**{name: value for name, value in found.items() if name in known})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{str(file)!r} line {number} is not a record: {error}") from None
        groups[record.group][record.question] = record
    whole = (group.values() for group in groups.values() if len(group) == next(iter(group.values())).of)
    return sorted((record for group in whole for record in group), key=lambda record: record.key)


def append(folder: Path, records: Sequence[Record]) -> None:
    """Adds a group's lines in one write, and waits until they are on the disk."""
    with (folder / FILE).open("ab", buffering=0) as file:
        file.write("".join(record.line() for record in records).encode())
        os.fsync(file.fileno())


def rewrite(folder: Path, records: Iterable[Record]) -> None:
    """These records and nothing else; the old file stays until the new one is whole."""
    draft = folder / f"{FILE}.new"
    with draft.open("wb") as file:
        file.writelines(record.line().encode() for record in records)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / FILE)
