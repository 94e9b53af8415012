"""The answers that lost most against the full cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from keepkv.eval.records import Key, Record
from keepkv.eval.summary import FULL

Texts = Callable[[Record], "str | None"]
MOST = 12
SHOWN = (
    f"The {MOST} answers that lost most against the full cache, at most three of a task, the largest loss of likelihood first."
)


def worst(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Answers of compressed caches that score less than the full cache's, with the full cache's."""
    full = {_asked(record): record for record in records if record.method == FULL}
    lost = [(r, full[_asked(r)]) for r in records if r.method != FULL and _asked(r) in full and r.score < full[_asked(r)].score]
    lost.sort(key=lambda pair: (pair[0].score - pair[1].score, _gain(*pair), pair[0].key))
    out: list[tuple[Record, Record]] = []
    for record, truth in lost:
        if len(out) < MOST and sum(other.task == record.task for other, _ in out) < 3:
            out.append((record, truth))
    return out


def _asked(record: Record) -> Key:
    return record.key._replace(method=FULL, budget="")


def _gain(record: Record, full: Record) -> float:
    return (record.loglik or 0.0) - (full.loglik or 0.0)


def file_of(record: Record) -> str:
    """Where a run keeps the text of a sample."""
    return f"texts/{record.task}-{record.length}-{record.sample}.txt"


def texts_of(folders: Sequence[Path]) -> Texts:
    """Looks a sample's text up in the runs' folders."""

    def find(record: Record) -> str | None:
        for folder in folders:
            file = folder / file_of(record)
            if file.exists():
                return file.read_text(encoding="utf-8")
        return None

    return find
