"""The answers that lost most against the full cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from keepkv.eval.records import Record
from keepkv.eval.summary import FULL, full_key

Texts = Callable[[Record], "str | None"]
MOST = 12
SHOWN = (
    f"The {MOST} answers that lost most against the full cache, at most three of a task. The largest loss of score comes first."
)


def worst(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Answers of compressed caches that score less than the full cache's, with the full cache's."""
    full = {full_key(record): record for record in records if record.method == FULL}
    pairs = [(record, full[full_key(record)]) for record in records if record.method != FULL and full_key(record) in full]
    losses = [(record, truth) for record, truth in pairs if record.score < truth.score]
    losses.sort(key=lambda pair: (pair[0].score - pair[1].score, _gain(*pair), pair[0].key))
    selection: list[tuple[Record, Record]] = []
    for record, truth in losses:
        if len(selection) < MOST and sum(other.task == record.task for other, _ in selection) < 3:
            selection.append((record, truth))
    return selection


def _gain(record: Record, full: Record) -> float:
    return (record.loglik or 0.0) - (full.loglik or 0.0)


def file_of(record: Record) -> str:
    """Where a run keeps the text of a sample."""
    return f"texts/{record.task}-{record.length}-{record.sample}.txt"


def texts_of(folders: Sequence[Path]) -> Texts:
    """A function that finds a sample's text in the runs' folders."""

    def find(record: Record) -> str | None:
        for folder in folders:
            file = folder / file_of(record)
            if file.exists():
                return file.read_text(encoding="utf-8")
        return None

    return find
