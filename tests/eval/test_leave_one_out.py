"""Leave one model out: a case that can be counted by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from helpers import run
from keepkv.errors import InputError
from keepkv.eval import records as files
from keepkv.eval.leave_one_out import leave_one_model_out
from keepkv.eval.records import Record

# right answers out of ten, and mean KL, of two constants on three models
RIGHT = {"a": {"x": 9, "y": 9, "z": 2}, "b": {"x": 8, "y": 6, "z": 8}}
KL = {"a": {"x": 0.1, "y": 0.1, "z": 2.0}, "b": {"x": 0.25, "y": 0.3, "z": 1.0}}


def made() -> list[Record]:
    out = []
    for model in "xyz":
        for sample in range(10):
            common = {"ask": "Who?", "kv_bytes_full": 100}
            out.append(Record(model, "t", 512, sample, 0, "full", "100%", score=1.0, kv_bytes=100, **common))
            for method in "ab":
                kl = KL[method][model] * (0.5 + sample / 9)
                score = float(sample < RIGHT[method][model])
                out += [
                    Record(model, "t", 512, sample, 0, method, "10%", score=score, measures={"kl": kl}, **common),
                    Record(model, "t", 512, sample, 0, method, "5%", score=1 - score, measures={"kl": 1 / kl}, **common),
                ]
    return out


def test_each_model_is_judged_by_what_the_others_chose() -> None:
    found = {(each.budget, each.model): each for each in leave_one_model_out(made())}
    assert list(found) == [(budget, model) for budget in ("10%", "5%") for model in "xyz"]
    chosen = {model: (found["10%", model].picked, found["10%", model].best) for model in "xyz"}
    assert chosen == {"x": ("b", "a"), "y": ("b", "a"), "z": ("a", "b")}  # y, z: a 11 of 20, b 14; x, z: 11, 16; x, y: 18, 14
    assert found["10%", "x"].chosen_on == ("y", "z")
    for model, regret in (("x", 0.1), ("y", 0.3), ("z", 0.6)):
        each = found["10%", model]
        assert each.result.value == pytest.approx(RIGHT[each.picked][model] / 10)
        assert each.best_result.value == pytest.approx(RIGHT[each.best][model] / 10)
        assert each.regret.value == pytest.approx(regret)
        assert each.regret.low <= each.regret.value <= each.regret.high
    assert found["5%", "z"].best == "a", "every budget has its own choice"


def test_by_kl_the_geometric_mean_over_models_decides_and_regret_is_a_ratio() -> None:
    found = {each.model: each for each in leave_one_model_out(made(), "kl") if each.budget == "10%"}
    assert {model: (each.picked, each.best) for model, each in found.items()} == {
        "x": ("a", "a"),  # y, z: sqrt(.1 · 2) < sqrt(.3 · 1), while the plain mean of a is larger
        "y": ("a", "a"),
        "z": ("a", "b"),
    }
    assert found["z"].result.value == pytest.approx(2.0, abs=1e-6)
    assert found["z"].regret == (2, 2, 2), "text by text twice as much"
    assert found["x"].regret == (1, 1, 1)
    assert math.sqrt(0.1 * 2) < math.sqrt(0.3) < (0.1 + 2) / 2


def test_what_was_not_asked_everything_cannot_be_chosen() -> None:
    missing = [r for r in made() if not (r.method == "b" and r.model == "x" and r.sample == 3)]
    assert {each.picked for each in leave_one_model_out(missing)} == {"a"}
    assert {each.choices for each in leave_one_model_out(missing)} == {1}
    weak = [replace(r, task="weak", score=0.05 if r.method == "full" else float(r.method == "a")) for r in made()]
    assert leave_one_model_out([*made(), *weak]) == leave_one_model_out(made())
    assert {each.picked for each in leave_one_model_out(made(), among=["b"])} == {"b"}
    rounded = [replace(r, slot_dtype="int8", score=1.0) for r in made() if r.method != "full"]
    assert {each.picked for each in leave_one_model_out([*made(), *rounded])} == {"a int8"}
    for records, measure, among, message in (
        (made(), "luck", None, "expected one of score, kl"),
        (made(), "score", ["c"], "there are no records of 'c'"),
        ([r for r in made() if r.model == "x"], "score", None, "at least two models"),
    ):
        with pytest.raises(InputError, match=message):
            leave_one_model_out(records, measure, among)


def test_the_command_prints_a_table_and_writes_json(monkeypatch, capsys, tmp_path) -> None:
    files.rewrite(tmp_path, made())
    status, out, _ = run(monkeypatch, capsys, "report", str(tmp_path), "--leave-one-model-out")
    assert status == 0
    assert "held out" in out
    assert out.count("10%") == 3
    status, out, _ = run(monkeypatch, capsys, "report", str(tmp_path), "--leave-one-model-out", "--by-measure", "kl", "--json")
    assert [each["picked"] for each in json.loads(out) if each["budget"] == "10%"] == ["a", "a", "a"]
    assert (tmp_path / "leave-one-model-out.json").read_text() == out
    assert {file.name for file in tmp_path.iterdir()} == {"records.jsonl", "leave-one-model-out.json"}
