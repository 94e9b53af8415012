"""The words in one line of a summary, for every kind of report."""

from __future__ import annotations

from keepkv.eval.summary import FULL, SummaryRow
from keepkv.render import size

COLUMNS = (
    "model",
    "budget",
    "method",
    "rank",
    "score",
    "retained",
    "vs full",
    "bytes",
    "of full",
    "questions",
    "failed",
)


def cells(row: SummaryRow) -> list[str]:
    """The words of a row, one for each of COLUMNS."""
    is_full = row.method == FULL
    return [
        row.model,
        row.budget,
        row.method,
        "" if is_full else f"{row.rank}",
        str(row.score or "–"),
        "" if is_full else str(row.retained or "–"),
        "" if is_full or row.lead is None else f"{row.lead.value:+.3f}",
        size(row.kv_bytes),
        f"{row.share:.1%}",
        f"{row.questions}",
        f"{row.failed or ''}",
    ]
