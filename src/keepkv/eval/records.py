"""Records: one JSON line a question, written so that killing the process loses nothing but the variant under way."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from keepkv import schema
from keepkv.errors import InputError
from keepkv.paths import atomic_file, read_file

FILE = "records.jsonl"


class RecordKey(NamedTuple):
    """What a record is about. Records of two runs with equal keys and prompts can be compared pair by pair."""

    model: str
    task: str
    length: int
    sample: int
    question: int
    method: str
    budget: str
    slot_dtype: str
    dtype: str


@dataclass(frozen=True)
class Record:
    """One question, asked of one method's cache at one budget.

    Args:
        model: As it was named at the command line.
        task: The task's name.
        length: The tokens that the text should have; 0 where the task has texts of its own.
        sample: Which sample of its task and length.
        question: Which question of its sample.
        method: The method's name, or a rival's.
        budget: The budget in words.
        slot_dtype: How the slots' keys and values are stored. Older records have none: "float".
        dtype: The model's own dtype. Older records have none: the run's, or "float32".
        of: How many questions the sample has.
        seed: The run's seed.
        text: SHA-256 of the text, 16 hexadecimal digits. Older records have none.
        prompt: SHA-256 of the text, the question and the answers, 16 hexadecimal digits.
        ask: The question.
        expected: The right answer in words.
        answer: What was answered.
        score: From 0 to 1.
        loglik: Mean log-probability of a token of the expected answer, in nats.
        chances: The same of the expected and the wrong answers, in their order.
        measures: Further measures of the task, by name.
        depth: Where in the text the answer stands, from 0 to 1, if it stands at one place.
        tokens: Tokens that were read.
        slots: Slots per KV head on average.
        kv_bytes: Bytes of the cache.
        kv_bytes_full: Bytes of the full cache.
        predicted: The error that the method predicts (`Report.error`).
        fallbacks: How often the method fell back to eviction.
        seconds: Of "read", "repeat", "compress" and "answer"; of "lookback" where something was looked back at.
        failed: Why there is no answer, if so.
        versions: Of Python and of the packages that a result may depend on.
        commit: Of keepkv's sources.
    """

    model: str
    task: str
    length: int
    sample: int
    question: int
    method: str
    budget: str
    slot_dtype: str = "float"
    dtype: str = "float32"
    of: int = 1
    seed: int = 0
    text: str = ""
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

    @cached_property
    def key(self) -> RecordKey:
        """What the record is about."""
        return RecordKey(*(getattr(self, name) for name in RecordKey._fields))

    @cached_property
    def asked(self) -> RecordKey:
        """The key without the variant: what was asked."""
        return self.key._replace(method="", budget="", slot_dtype="")

    @property
    def group(self) -> RecordKey:
        """The key of all questions that were asked of the same cache."""
        return self.key._replace(question=0)

    def line(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def load_records(folder: Path) -> list[Record]:
    """The complete records of a run, sorted by key.

    A killed process may leave an unfinished last line, and groups with missing questions: both are left out.

    Raises:
        InputError: if the folder has no records, or another line is broken.
    """
    file = folder / FILE
    try:
        content = read_file(file)
    except OSError as error:
        raise InputError(
            f"{str(folder)!r} is not the folder of a run: {FILE} cannot be read ({error.strerror}). "
            "Give a folder that keepkv eval has written"
        ) from error
    lines = content.split(b"\n")[:-1]  # what follows the last line's end is empty or unfinished
    older = {"dtype": _dtype_of_older_records(folder)}
    groups: dict[RecordKey, dict[int, Record]] = defaultdict(dict)
    for number, line in enumerate(lines, 1):
        try:
            record = schema.dataclass_of(Record, older | schema.parse(line))
        except ValueError as error:
            raise InputError(
                f"{str(file)!r} line {number} is not a record ({error}): delete the line, and the run measures it again"
            ) from None
        groups[record.group][record.question] = record
    complete = (group.values() for group in groups.values() if len(group) == next(iter(group.values())).of)
    return sorted((record for group in complete for record in group), key=lambda record: record.key)


def _dtype_of_older_records(folder: Path) -> str:
    """What a run's settings say of the dtype; "auto" was float32, unless the run had a GPU."""
    settings = folder / "config.toml"
    named = re.search(r'^dtype = "(\w+)"', settings.read_text(encoding="utf-8"), re.MULTILINE) if settings.exists() else None
    return named[1] if named and named[1] != "auto" else Record.dtype


def append(folder: Path, records: Sequence[Record]) -> None:
    """Adds a group's lines in one write, and waits until they are on the disk."""
    with (folder / FILE).open("ab", buffering=0) as file:
        file.write("".join(record.line() for record in records).encode())
        os.fsync(file.fileno())


def rewrite(folder: Path, records: Iterable[Record]) -> None:
    """These records and nothing else; the old file stays until the new one is whole."""
    with atomic_file(folder / FILE) as draft, draft.open("wb") as file:
        file.writelines(record.line().encode() for record in records)
