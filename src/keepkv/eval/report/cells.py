"""The words in one line of a summary, for every kind of report."""

from __future__ import annotations

from keepkv.eval.summary import FULL, Row
from keepkv.render import size

COLUMNS = ("model", "budget", "method", "rank", "score", "retained", "to full", "kept", "of full", "asked", "failed")


def cells(row: Row) -> list[str]:
    """A row's words: model, budget, method, rank, score, retained, lead, bytes, share, questions, failed."""
    whole = row.method == FULL
    return [
        row.model, row.budget, row.method, "" if whole else f"{row.rank}", str(row.score or "–"),
        "" if whole else str(row.retained or "–"), "" if whole or row.lead is None else f"{row.lead.value:+.3f}",
        size(row.kv_bytes), f"{row.share:.1%}", f"{row.questions}", f"{row.failed or ''}",
    ]  # fmt: skip
