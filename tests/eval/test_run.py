"""Runs: every task is measured, failures stay, and a run that was killed resumes to the same bytes."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("name", registry.TASKS)
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
        assert ours.measures["kl"] > 0.01
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
