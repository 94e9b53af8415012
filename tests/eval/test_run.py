"""Runs: every task is measured, failures stay, and a run that was killed resumes to the same bytes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import LOG, run
from keepkv.eval import plan as running
from keepkv.eval import records
from keepkv.eval.config import Config
from keepkv.eval.measure import Setup
from keepkv.eval.plan import Variant
from keepkv.eval.run import measured, sampled
from keepkv.eval.tasks import registry

SMALL = {"haystack": str(LOG), "lengths": (300,), "samples": 1, "methods": ("snapkv", "streaming"), "budgets": ("25%",)}


@pytest.fixture(scope="module")
def setup(folder: str) -> Setup:
    from keepkv.models import loading

    return Setup(*loading.load(folder, "cpu", "auto"), Config(models=(folder,), **SMALL, written=40, period=64))


@pytest.mark.parametrize("name", [name for name in registry.TASKS if not name.endswith("-paraphrased")])
def test_every_task_runs_and_the_full_cache_is_the_yardstick(name: str, setup: Setup) -> None:
    config = replace(setup.config, tasks=(name,))
    job = running.Job("tiny", name, 600, 0, tuple(running.variants(config)))
    found = {group[0].method: group for group in measured(setup._replace(config=config), job)}
    assert list(found) == ["full", "snapkv", "streaming"]
    assert not any(r.failed for group in found.values() for r in group)
    full, ours = found["full"][0], found["snapkv"][0]
    assert full.kv_bytes == full.kv_bytes_full > 3 * ours.kv_bytes
    assert found["streaming"][0].kv_bytes == pytest.approx(ours.kv_bytes, rel=0.02), "equal budgets are equal bytes"
    assert full.prompt == ours.prompt
    if name in ("fidelity", "drift"):
        assert full.score == 1.0
        assert full.measures["kl"] == pytest.approx(0, abs=1e-4)
        assert ours.measures["kl"] > 5e-4, "less than all is kept: int8 holds three quarters of the tokens in these bytes"
    else:
        assert len(full.chances) == 4


def test_the_full_caches_likelihoods_are_those_of_plain_transformers(setup: Setup) -> None:
    import torch

    from keepkv.text.prompt import Prompt

    config = replace(setup.config, tasks=("needle",))
    job = running.Job("tiny", "needle", 600, 1, (running.FULL_CACHE,))
    (found,) = next(measured(setup._replace(config=config), job))
    sample = sampled(setup, registry.TASKS["needle"], 600, 1)
    prompt, question = Prompt(setup.tokenizer, sample.text), sample.questions[0]
    answer = setup.tokens(question.wrong[1])
    ids = torch.cat([prompt.text, prompt.question(question.ask), answer], 1)
    logits = setup.model(ids).logits[0, -answer.shape[1] - 1 : -1].float().log_softmax(-1)
    assert found.chances[2] == pytest.approx(float(logits.gather(1, answer[0, :, None]).mean()), abs=1e-4)


def test_question_aware_and_by_answer(setup: Setup) -> None:
    config = replace(setup.config, question_aware=True, by="answer", max_new_tokens=4)
    (found,) = next(measured(setup._replace(config=config), running.Job("tiny", "json", 500, 0, (Variant("snapkv", "25%"),))))
    assert not found.failed
    assert set(found.measures) == {"name", "job", "town", "born"}
    plain = replace(config, question_aware=False)
    (other,) = next(measured(setup._replace(config=plain), running.Job("tiny", "json", 500, 0, (Variant("snapkv", "25%"),))))
    assert found.tokens > other.tokens + 100
    assert found.prompt == other.prompt


@pytest.mark.parametrize("by", ["choice", "answer"])
@pytest.mark.parametrize("name", ["needles-4", "turns"])
def test_what_is_looked_back_at_is_measured(name: str, by: str, setup: Setup, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path))
    monkeypatch.setattr("keepkv.lookback.look_back.FLAT", 0.0)
    config = replace(setup.config, tasks=(name,), methods=("snapkv",), budgets=("15%",), lookback="128", by=by)
    job = running.Job("tiny", name, 600, 0, tuple(running.variants(config)))
    full, ours = measured(setup._replace(config=config), job)
    assert not any(record.failed for record in (*full, *ours))
    assert all(64 <= record.measures["looked_back_tokens"] <= 128 for record in ours)
    assert all(record.measures["looked_back_bytes"] > 0 < record.measures["index_bytes"] for record in ours)
    assert all(record.seconds["lookback"] > 0 for record in ours)
    assert len({record.kv_bytes for record in ours}) == 1, "the bytes are the compact cache's"
    assert not any("looked_back_tokens" in record.measures for record in full)


def test_what_fails_is_recorded(setup: Setup) -> None:
    job = running.Job("tiny", "needle", 500, 0, (running.FULL_CACHE, Variant("snapkv", "2"), Variant("streaming", "25%")))
    full, low, fine = (group[0] for group in measured(setup, job))
    assert (full.failed, fine.failed) == ("", "")
    assert low.failed.startswith("BudgetError: ")
    assert low.prompt == full.prompt
    long = running.Job("tiny", "needle", 10**6, 0, (running.FULL_CACHE,))
    assert next(measured(setup, long))[0].failed.startswith("InputError: the haystack has")


ARGS = [
    "--tasks",
    "needles-4,needle,json",
    "--methods",
    "snapkv,streaming",
    "--budgets",
    "25%,40",
    "--lengths",
    "500",
    "--samples",
    "2",
]


def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    args = ["--model", folder, "--haystack", str(LOG), *ARGS]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert run(monkeypatch, capsys, "eval", str(whole), *args)[0] == 0
    command = [sys.executable, "-m", "keepkv", "eval", str(torn), *args]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    file = torn / "records.jsonl"
    while process.poll() is None and not (file.exists() and file.stat().st_size > 5000):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = file.read_bytes()
    lines = (whole / "records.jsonl").read_bytes()
    assert 0 < len(killed) < len(lines)
    for cut in (len(killed), len(killed) - 7, 1):  # also in the middle of a write
        file.write_bytes(killed[:cut])
        assert run(monkeypatch, capsys, "eval", str(torn))[0] == 0
        assert (torn / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
    stripped = [[replace(r, seconds={}) for r in records.load_records(place)] for place in (whole, torn)]
    assert stripped[0] == stripped[1]
    before = file.read_bytes()
    assert run(monkeypatch, capsys, "eval", str(torn))[0] == 0
    assert file.read_bytes() == before or records.load_records(torn) == records.load_records(torn), "nothing is done twice"
    status, _, said = run(monkeypatch, capsys, "eval", str(torn), "--seed", "5")
    assert status == 2
    assert "has seed = 0, not 5" in said
    status, out, _ = run(monkeypatch, capsys, "eval", str(torn), "--methods", "snapkv", "--json")
    assert status == 0
    assert {row["method"] for row in json.loads(out)["rows"]} == {"full", "snapkv", "streaming"}


def test_two_processes_come_to_the_same_summary(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    args = ["--model", folder, "--haystack", str(LOG), "--tasks", "needle,json", "--methods", "snapkv", "--budgets", "25%"]
    args += ["--lengths", "300", "--samples", "2"]
    for name, more in (("one", []), ("two", ["--workers", "2", "--device", "cpu"])):
        assert run(monkeypatch, capsys, "eval", str(tmp_path / name), *args, *more)[0] == 0
    assert (tmp_path / "one" / "summary.json").read_bytes() == (tmp_path / "two" / "summary.json").read_bytes()


def test_models_slot_dtypes_and_own_methods_are_measured_in_one_run_piece_by_piece(
    monkeypatch, capsys, folder: str, tmp_path: Path
) -> None:
    """--minutes 0 makes one measurement a time; the pieces end as the run that was not stopped."""
    second = tmp_path / "second"
    shutil.copytree(folder, second)
    own = tmp_path / "own.py"
    own.write_text(
        'from dataclasses import replace\nfrom keepkv.methods import get\nMINE = replace(get("snapkv"), name="mine")\n'
    )
    args = ["--model", f"{folder},{second}", "--haystack", str(LOG), "--tasks", "needle", "--methods", f"{own}:MINE,streaming"]
    args += ["--budgets", "25%", "--slot-dtype", "float,int8", "--lengths", "300", "--samples", "1"]
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert run(monkeypatch, capsys, "eval", str(whole), *args)[0] == 0
    found = records.load_records(whole)
    assert not any(record.failed for record in found)
    assert len({record.key for record in found}) == 12
    assert {(r.model, r.method, r.slot_dtype) for r in found} == {
        (model, method, slots)
        for model in (folder, str(second))
        for method, slots in [("full", "float"), ("kivi", "int8"),
                              *((own, slots) for own in ("mine", "streaming") for slots in ("float", "int8"))]
    }  # fmt: skip
    assert {record.dtype for record in found} == {"float32"}
    held = {(record.method, record.slot_dtype): record.kv_bytes for record in found}
    assert held["kivi", "int8"] < held["full", "float"] / 2
    assert held["mine", "int8"] == pytest.approx(held["mine", "float"], rel=0.1), "a share is one of bytes"
    for left in (11, 10):
        status, _, said = run(monkeypatch, capsys, "eval", str(pieces), *args, "--minutes", "0")
        assert status == 0
        assert f"1 measurements made, {left} are left. The same command continues." in " ".join(said.split())
        assert len(records.load_records(pieces)) == 12 - left
    status, _, said = run(monkeypatch, capsys, "eval", str(pieces), "--minutes", "60")
    assert status == 0
    assert "are left" not in said
    assert (pieces / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
    assert len(list((whole / "texts").rglob("*.txt"))) == 2
    workers = ["--workers", "2", "--device", "cpu"]
    for minutes in (["--minutes", "0"], []):
        assert run(monkeypatch, capsys, "eval", str(tmp_path / "two"), *args, *workers, *minutes)[0] == 0
    assert (tmp_path / "two" / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
    out = run(monkeypatch, capsys, "report", str(whole))[1]
    assert str(second) in out.replace("\n", "")


def test_a_run_of_an_older_keepkv_goes_on(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    args = ["--model", folder, "--haystack", str(LOG), "--tasks", "needle", "--methods", "snapkv", "--budgets", "25%"]
    args += ["--slot-dtype", "float", "--lengths", "300", "--samples", "1"]
    assert run(monkeypatch, capsys, "eval", str(tmp_path), *args)[0] == 0
    settings, lines = tmp_path / "config.toml", tmp_path / "records.jsonl"
    text = settings.read_text().replace(f'models = ["{folder}"]', f'model = "{folder}"')
    settings.write_text(text.replace('slot_dtypes = ["float"]\n', ""))
    assert not {"models", "slot_dtypes"} & {line.split()[0] for line in settings.read_text().splitlines()}
    older = [json.loads(line) for line in lines.read_text().splitlines()]
    new = ("slot_dtype", "dtype", "text")
    lines.write_text("".join(json.dumps({k: v for k, v in each.items() if k not in new}) + "\n" for each in older))
    before, summary = records.load_records(tmp_path), (tmp_path / "summary.json").read_bytes()
    assert run(monkeypatch, capsys, "eval", str(tmp_path))[0] == 0
    assert records.load_records(tmp_path) == before, "nothing is measured again"
    assert (tmp_path / "summary.json").read_bytes() == summary
    second = tmp_path / "second"
    shutil.copytree(folder, second)
    assert (
        run(monkeypatch, capsys, "eval", str(tmp_path), "--model", f"{folder},{second}", "--slot-dtype", "float,int4")[0] == 0
    )
    grown = records.load_records(tmp_path)
    assert all(record in grown for record in before)
    assert {(r.model, r.method, r.slot_dtype) for r in grown if r not in before} == {
        *((folder, method, "int4") for method in ("kivi", "snapkv")),
        *(
            (str(second), *variant)
            for variant in (("full", "float"), ("kivi", "int4"), ("snapkv", "float"), ("snapkv", "int4"))
        ),
    }


def test_bfloat16_and_float32_runs_stand_in_one_table(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    args = ["--model", folder, "--haystack", str(LOG), "--tasks", "fidelity", "--methods", "snapkv", "--budgets", "25%"]
    for dtype in ("float32", "bfloat16"):
        more = ["--dtype", dtype, "--lengths", "300", "--samples", "1"]
        assert run(monkeypatch, capsys, "eval", str(tmp_path / dtype), *args, *more)[0] == 0
    both = [str(tmp_path / "float32"), str(tmp_path / "bfloat16")]
    status, out, _ = run(monkeypatch, capsys, "report", *both, "--out", str(tmp_path / "both"), "--json")
    assert status == 0
    rows = [row for row in json.loads(out)["rows"] if row["task"] == "all tasks"]
    assert sorted((row["dtype"], row["method"]) for row in rows) == [
        (dtype, method) for dtype in ("bfloat16", "float32") for method in ("full", "snapkv")
    ]
    full = {row["dtype"]: row["kv_bytes"] for row in rows if row["method"] == "full"}
    assert full["float32"] == 2 * full["bfloat16"]
    assert f"### {folder}, bfloat16" in (tmp_path / "both" / "report.md").read_text()
