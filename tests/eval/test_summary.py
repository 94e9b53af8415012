"""Summaries: ranks, failures, what stays right, ratios, and what is left out."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from keepkv.eval import records, summary
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


def asked(method: str, sample: int, question: int, score: float, **more: object) -> Record:
    return replace(record(method, sample, score, ask="Who?", of=4, **more), question=question)


def test_what_stays_right_is_counted_over_what_the_full_cache_gets_right() -> None:
    rng = random.Random(0)
    full = [asked("full", i, j, float(rng.random() < 0.7)) for i in range(30) for j in range(4)]
    ours = [asked("ours", i, j, float(rng.random() < 0.6)) for i in range(30) for j in range(4)]
    (row, overall) = (r for r in summary.summarize([*full, *ours]).rows if r.method == "ours")
    pairs = [(a.score, b.score) for a, b in zip(full, ours, strict=True)]
    right = [ours_score for full_score, ours_score in pairs if full_score == 1]
    assert row.kept.value == pytest.approx(sum(right) / len(right), abs=1e-6)
    assert row.kept_questions == len(right)
    assert row.kept_texts == len({r.sample for r in full if r.score == 1})
    assert row.kept == overall.kept
    assert row.decides == (len(right) >= 100)
    assert not any(r.decides for r in summary.summarize([*full[:76], *ours[:76]]).rows), "76 questions of 19 texts"
    assert all(r.kept is None for r in summary.summarize([*full, *ours]).rows if r.is_full)
    prose = [record(name, i, score) for i in range(3) for name, score in (("full", 1.0), ("ours", 0.9))]
    assert all(r.kept is None and not r.kept_questions for r in summary.summarize(prose).rows), "no question, no answer"


def test_a_task_near_guessing_is_left_out_and_listed() -> None:
    chances = (-1.0, -2.0, -3.0, -4.0)
    weak = [record(name, i, float(i < 4), chances=chances) for i in range(12) for name in ("full", "ours")]  # 1/3 < 1/4 + .1
    fine = [replace(r, task="u", score=float(r.sample < 6)) for r in weak]
    found = summary.summarize([*weak, *fine])
    (out,) = found.left_out
    assert (out.model, out.task, out.length, out.questions) == ("m", "t", 512, 12)
    assert (out.full, out.guessing) == (pytest.approx(1 / 3, abs=1e-6), 0.25)
    overall = next(r for r in found.rows if r.task == summary.ALL and r.method == "ours")
    assert (overall.questions, overall.score.value) == (12, 0.5)
    assert {(r.task, r.left_out) for r in found.rows} == {("t", True), ("u", False), (summary.ALL, False)}
    written = [replace(r, chances=(-1.0,), score=0.09) for r in weak]
    assert summary.summarize(written).left_out[0].guessing == 0
    assert not summary.summarize([replace(r, score=0.11) for r in written]).left_out
    other = [replace(r, model="n", score=1.0) for r in weak]
    both = summary.summarize([*weak, *other])
    assert {(out.model, out.task) for out in both.left_out} == {("m", "t")}
    assert {r.model for r in both.rows if r.task == summary.ALL} == {"n"}


def test_slots_and_dtypes_stand_beside_each_other() -> None:
    full = [record("full", i, 1.0) for i in range(8)]
    rounded = [replace(r, slot_dtype="int4", score=0.5, kv_bytes=25) for r in full]
    ours = [record("ours", i, 1.0) for i in range(8)]
    small = [replace(r, slot_dtype="int4", score=0.0) for r in ours]
    half = [replace(r, dtype="bfloat16", score=r.score / 2) for r in (*full, *ours)]
    found = summary.summarize([*full, *rounded, *ours, *small, *half])
    overall = {(r.dtype, r.budget_and_slots, r.method): r for r in found.rows if r.task == summary.ALL}
    assert len(overall) == 6
    assert overall["float32", "100% int4", "full"].retained.value == 0.5
    assert overall["float32", "100%", "full"].is_full
    assert overall["float32", "10% int4", "ours"].retained.value == 0
    assert overall["bfloat16", "10%", "ours"].retained.value == 1, "compared with the full cache of its own dtype"
    assert found.versus == ()


def test_ratios_are_of_means_over_the_texts_of_both() -> None:
    full = [record("full", i, 1.0, measures={"kl": 0.0}) for i in range(9)]
    kl = {"a": [0.1 * (i + 1) for i in range(9)], "b": [0.3 + 0.01 * i for i in range(9)]}
    ours = [record(name, i, 1.0, measures={"kl": kl[name][i]}) for name in kl for i in range(9)]
    lost = [replace(r, failed="gone", measures={}) if (r.method, r.sample) == ("a", 8) else r for r in ours]
    for some, last in ((ours, 9), (lost, 8)):
        (found,) = summary.summarize([*full, *some]).ratios
        assert (found.first, found.second, found.texts) == ("a", "b", last)
        assert found.ratio.value == pytest.approx(sum(kl["a"][:last]) / sum(kl["b"][:last]), abs=1e-6)
        assert found.apart == (found.ratio.low > 1)


def test_a_text_that_two_tasks_share_is_one_text() -> None:
    full = [record("full", i, 1.0, text=f"text {i}") for i in range(6)]
    ours = [record("ours", i, float(i > 1), text=f"text {i}") for i in range(6)]
    same = [replace(r, task="u") for r in (*full, *ours)]
    other = [replace(r, text=f"other {r.sample}") for r in same]
    one, shared, apart = (
        next(r.score for r in summary.summarize([*full, *ours, *more]).rows if (r.task, r.method) == (summary.ALL, "ours"))
        for more in ((), same, other)
    )
    assert shared == one
    assert apart.value == one.value
    assert apart.high - apart.low < one.high - one.low


def test_records_of_an_older_run_are_read(tmp_path: Path) -> None:
    values = {
        key: value for key, value in asdict(record("keepkv", 0, 1.0)).items() if key not in ("slot_dtype", "dtype", "text")
    }
    (tmp_path / records.FILE).write_text(json.dumps(values) + "\n")
    (old,) = records.load_records(tmp_path)
    assert (old.slot_dtype, old.dtype) == ("float", "float32")
    for dtype, read in (("auto", "float32"), ("bfloat16", "bfloat16")):
        (tmp_path / "config.toml").write_text(f'model = "m"\ndtype = "{dtype}"\n')
        assert records.load_records(tmp_path)[0].dtype == read
