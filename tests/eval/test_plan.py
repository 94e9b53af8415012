"""Plans: every variant once, and only what can be measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from helpers import LOG
from keepkv.errors import MethodError
from keepkv.eval import plan
from keepkv.eval.config import Config
from keepkv.eval.plan import FULL_CACHE, Variant
from keepkv.eval.records import Record
from keepkv.eval.run import settled
from keepkv.methods import METHODS

CONFIG = Config(tasks=("needle",), methods=("snapkv", "full"), budgets=("10%", "5%"), samples=2)


def test_the_full_cache_comes_first_and_quantized_to_every_slot_dtype() -> None:
    auto = [FULL_CACHE, Variant("snapkv", "10%", "auto"), Variant("snapkv", "5%", "auto")]
    assert plan.variants(CONFIG) == auto
    named = replace(CONFIG, methods=("kivi",), budgets=("10%",))
    assert plan.variants(named) == [FULL_CACHE, Variant("kivi", "100%", "auto")]
    both = plan.variants(replace(named, slot_dtypes=("int4", "auto")))
    assert [v.slot_dtype for v in both if v.method == "kivi"] == ["int4"], "where every token is kept, auto is int4"
    rounded = replace(CONFIG, slot_dtypes=("int8", "int4"), budgets=("10%",))
    assert plan.variants(rounded) == [
        FULL_CACHE,
        Variant("kivi", "100%", "int8"),
        Variant("kivi", "100%", "int4"),
        Variant("snapkv", "10%", "int8"),
        Variant("snapkv", "10%", "int4"),
    ]
    pairs = replace(CONFIG, methods=("minicache",), budgets=("10%",), slot_dtypes=("float", "int8"))
    assert plan.variants(pairs)[2:] == [Variant("minicache", "10%")], "layers that are stored together cannot be quantized"
    assert plan.variants(replace(pairs, slot_dtypes=("auto",))) == [FULL_CACHE, Variant("minicache", "10%", "auto")]


def test_all_is_every_method_of_the_table() -> None:
    config = settled(replace(CONFIG, methods=("all", "snapkv"), haystack=str(LOG)))
    assert config.methods == tuple(METHODS)
    assert {v.method for v in plan.variants(config)} == {*METHODS}
    assert plan.named(("bm25", "all", "snapkv"), METHODS) == ("bm25", *METHODS)
    assert len(settled(replace(CONFIG, tasks=("all",), haystack=str(LOG))).tasks) > 10


def test_models_come_one_after_the_other_and_what_is_recorded_is_not_missing() -> None:
    config = replace(CONFIG, models=("a", "b"))
    jobs = plan.jobs(config, [])
    assert [(job.model, job.number) for job in jobs] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    done = [
        Record("a", "needle", 1024, 0, 0, *variant, dtype="bfloat16", failed="also what failed is recorded")
        for variant in plan.variants(config)
    ]
    assert [(job.model, job.number) for job in plan.jobs(config, done)] == [("a", 1), ("b", 0), ("b", 1)]
    grown = replace(config, slot_dtypes=("auto", "int8"))
    assert plan.jobs(grown, done)[0].missing == tuple(v for v in plan.variants(grown) if v.slot_dtype == "int8")


OWN = """
from keepkv.methods import Method, get
from dataclasses import replace
FIRST = replace(get("snapkv"), name="first", recent=16)
SECOND = replace(get("snapkv"), name="second", recent=8)
SAME = replace(get("snapkv"), name="first", recent=4)
"""


def test_own_methods_are_told_apart_by_their_names(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    found = plan.contenders([f"{file}:FIRST", f"{file}:SECOND", "snapkv", f"{file}:FIRST"])
    assert [(name, one.recent) for name, one in found.items()] == [
        ("full", 32), ("kivi", 32), ("first", 16), ("second", 8), ("snapkv", 32),
    ]  # fmt: skip
    with pytest.raises(MethodError, match="two methods are called 'first'"):
        plan.contenders([f"{file}:FIRST", f"{file}:SAME"])
    with pytest.raises(MethodError, match="unknown method or rival 'bm24': did you mean 'bm25'"):
        plan.contenders(["bm24"])
