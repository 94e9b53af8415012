"""The words in one line of a summary, for every kind of report."""

from __future__ import annotations

from collections.abc import Sequence

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


def informative_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The table without columns that are empty, and without the model or the task where there is only one."""

    def informs(i: int) -> bool:
        values = {row[i] for row in rows}
        return any(values) and not (head[i] in ("model", "task") and len(values) == 1)

    columns = [i for i in range(len(head)) if informs(i)]
    return [head[i] for i in columns], [[row[i] for i in columns] for row in rows]
