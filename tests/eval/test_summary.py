"""Summaries: ranks and failures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from keepkv.eval import summary
from keepkv.eval.bootstrap import ranks
from keepkv.eval.records import Record


def record(method: str, sample: int, score: float, **more: object) -> Record:
    budget = "100%" if method == "full" else "10%"
    fields = {"kv_bytes": 10, "kv_bytes_full": 100, **more}
    return Record("m", "t", 512, sample, 0, method, budget, prompt=f"{sample}", score=score, **fields)


def test_ranks_only_where_intervals_separate_and_failures_count() -> None:
    full = [record("full", i, 1.0) for i in range(12)]
    good, bad = ([record(name, i, float(i % 12 < hits)) for i in range(12)] for name, hits in (("good", 11), ("bad", 2)))
    close = [record("close", i, float(i % 12 != 3)) for i in range(12)]
    found = summary.summarize([*full, *good, *bad, *close])
    rank = {row.method: row.rank for row in found.rows if row.task == summary.ALL and row.method != "full"}
    assert rank == {"good": 1, "close": 1, "bad": 3}
    apart = {(v.first, v.second): v.apart for v in found.versus}
    assert apart == {("bad", "close"): True, ("bad", "good"): True, ("close", "good"): False}
    lost = [replace(r, failed="OSError: gone", score=0.0) if r.sample < 6 else r for r in good]
    row = next(r for r in summary.summarize([*full, *lost]).rows if r.method == "good" and r.task == "t")
    assert (row.failed, row.questions) == (6, 12)
    assert row.retained.value == pytest.approx(5 / 12, abs=1e-5)
    assert ranks(["a", "b"], {}) == {"a": 1, "b": 1}
