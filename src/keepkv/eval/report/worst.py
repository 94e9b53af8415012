"""The answers that lost most against the full cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from keepkv.eval.records import Record
from keepkv.eval.summary import full_key, full_records, tasks_left_out
from keepkv.paths import read_file, real

_MOST_BYTES = 64 << 20  # of a text

Texts = Callable[[Record], "str | None"]
MOST = 12
SHOWN = (
    f"The {MOST} answers that lost most against the full cache, at most three of a task. The largest loss of score comes first."
)


def worst(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Answers of compressed caches that score less than the full cache's, with the full cache's."""
    full = full_records(records)
    left_out = tasks_left_out(full)
    pairs = [
        (record, full[full_key(record)])
        for record in records
        if full_key(record) in full and (record.model, record.dtype, record.task, record.length) not in left_out
    ]
    losses = [(record, truth) for record, truth in pairs if record.score < truth.score]
    losses.sort(key=lambda pair: (pair[0].score - pair[1].score, _gain(*pair), pair[0].key))
    selection: list[tuple[Record, Record]] = []
    for record, truth in losses:
        if len(selection) < MOST and sum(other.task == record.task for other, _ in selection) < 3:
            selection.append((record, truth))
    return selection


def _gain(record: Record, full: Record) -> float:
    return (record.loglik or 0.0) - (full.loglik or 0.0)


def variant_of(record: Record) -> str:
    """A record's method, budget and slot dtype in words."""
    return f"{record.method} at {record.budget} {record.slot_dtype}".removesuffix(" float")


def file_of(record: Record) -> str:
    """Where a run keeps the text of a sample: a model's tokenizer decides how long it is."""
    return f"texts/{_name(record.model).strip('.-') or 'model'}/{_name(record.task)}-{record.length}-{record.sample}.txt"


def _name(text: str) -> str:
    """A text as part of a file's name: what a record says never leads out of the run's folder."""
    return "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in text)


def texts_of(folders: Sequence[Path]) -> Texts:
    """A function that finds a sample's text in the runs' folders."""

    def find(record: Record) -> str | None:
        for folder in folders:
            file = folder / file_of(record)
            for place in (file, file.parent.parent / file.name):  # older runs have no folder for a model
                if real(place).is_relative_to(real(folder)):  # a link may lead elsewhere
                    with suppress(OSError):
                        return read_file(place, limit=_MOST_BYTES).decode(errors="replace")
        return None

    return find
