"""The evaluation: samples are what they claim, runs resume to the same bytes, failures stay, intervals are right."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import run
from keepkv.errors import InputError
from keepkv.eval import metrics, records, summary
from keepkv.eval import plan as running
from keepkv.eval.bootstrap import combined, ranks
from keepkv.eval.config import Config, changed, load, written
from keepkv.eval.measure import Host
from keepkv.eval.records import Record
from keepkv.eval.run import measured, sampled
from keepkv.eval.sample import Draw, Prose
from keepkv.eval.tasks import haystack, registry

LOG = str(Path(__file__).parent.parent / "examples" / "expedition-log.txt")
PROSE = Prose(haystack.sentences(LOG), lambda text: len(text.split()))
SMALL = {"haystack": LOG, "lengths": (300,), "samples": 1, "methods": ("snapkv", "streaming"), "budgets": ("25%",)}


def draw(number: int = 0, tokens: int = 400, seed: str = "a") -> Draw:
    return Draw(random.Random(seed), PROSE, tokens, number)


@pytest.mark.parametrize("name", registry.TASKS)
def test_a_sample_holds_its_answers_and_no_wrong_one_scores_as_much(name: str) -> None:
    for number in range(3):
        task = registry.TASKS[name]
        sample, again = (task.make(draw(number, seed=f"{number}")) for _ in range(2))
        said = sample.text or " ".join(user for user, _ in sample.turns)
        assert said == (again.text or " ".join(user for user, _ in again.turns)), "seeded"
        assert said != (task.make(draw(number, seed="other")).text or "")
        assert 300 < len(said.split()) < 900 or name in ("pairs", "common", "frequent", "fidelity")
        for question in sample.questions:
            if question.wrong:
                assert question.score(question.expected) == 1.0
                assert max(map(question.score, question.wrong)) < 1.0
                assert len({question.expected, *question.wrong}) == 4


@pytest.mark.parametrize("name", ["needle", "needles-4", "needles-8-uuids", "multi-value", "multi-query", "facts", "pairs"])
def test_every_value_asked_for_stands_in_the_text_where_it_is_said_to(name: str) -> None:
    for number in range(5):
        sample = registry.TASKS[name].make(draw(number, seed=f"{number}"))
        for question in sample.questions:
            values = question.expected.split(" is ")[-1].strip(". ").split(", ")
            assert all(value in sample.text for value in values)
            if question.depth is not None and name.startswith("needle"):
                assert sample.text.index(values[0]) / len(sample.text) == pytest.approx(question.depth, abs=0.12)


def test_a_haystack_is_never_repeated() -> None:
    with pytest.raises(InputError, match="fewer than the"):
        registry.TASKS["needle"].make(draw(tokens=10**6))
    sample = registry.TASKS["needle"].make(draw(tokens=2500))
    prose = [sentence for sentence in PROSE.sentences if sentence in sample.text]
    assert len(prose) > 30
    assert all(sample.text.count(sentence) == PROSE.sentences.count(sentence) for sentence in prose)


def test_the_default_haystack_is_long_real_prose(tmp_path: Path) -> None:
    found = haystack.sentences()
    assert sum(map(len, found)) > 200_000
    assert len(set(found)) > 0.9 * len(found)
    for name, text in (
        ("b.txt", "Second text. " * 30),
        ("a.md", "The first text is here. " * 30),
        ("c.bin", "No text at all. " * 30),
    ):
        (tmp_path / name).write_text(text)
    folder = haystack.sentences(str(tmp_path))
    assert folder[0] == "The first text is here."
    assert not any("No text" in sentence for sentence in folder)


def test_scores() -> None:
    assert metrics.f1("the Cat sat")("A cat sat down") == pytest.approx(2 * 2 / (3 + 2))
    assert metrics.exact("The cat.")("cat") == 1
    assert metrics.rouge_l("a b c d")("a x c d") == pytest.approx(0.75)
    assert metrics.last_number("1,200")("first 3, so 1200.") == 1
    assert metrics.numbers("Paragraph 7")("7 or 9") == 0.5
    assert metrics.all_of("x1", "x2", "x3", "x4")("X2 and x4") == 0.5
    person = metrics.fields({"name": "Ann", "born": "1950"})
    assert person('Sure: {"name": "ann", "born": "1951"}') == 0.5
    assert person('{"name": "Ann", "born": "1950", "age": "3"}') == person('{"name": "Ann", "born": 1950}') == person("{") == 0


ROWS = {
    "squad": {"data": [{"paragraphs": [
        {"context": f"Mr Stone{i} lives in town {i}. " * 20,
         "qas": [{"question": f"Where is {i}?", "answers": [{"text": f"town {i}"}]}]} for i in range(9)]}]},
    "pairs": {"ordered_kv_records": [[f"k{i}", f"v{i}"] for i in range(9)], "key": "k3", "value": "v3"},
    "ruler": {"index": 0, "input": "Some text.\nMore text.\nWhat is the number? It is", "outputs": ["42"], "length": 9},
    "longbench": {"input": "Who?", "context": "Some text.", "answers": ["Ann"], "dataset": "hotpotqa", "length": 2},
    "gsm8k": {"question": "1 + 1?", "answer": "It is 2. #### 2"},
    "qmsum": {"meeting_transcripts": [{"speaker": "A", "content": "We sell."}],
              "general_query_list": [{"query": "Sum up.", "answer": "They sell."}], "specific_query_list": []},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_files_of_other_benchmarks_become_tasks(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"{kind}.jsonl"
    row = ROWS[kind]
    other = json.loads(json.dumps(row).replace("42", "43").replace("Ann", "Bob").replace("They sell", "They buy"))
    file.write_text(json.dumps(row) if kind == "squad" else f"{json.dumps(row)}\n{json.dumps(other)}\n")
    task = registry.from_file(str(file))
    sample = task.make(draw(0, tokens=200))
    assert sample.questions[0].score(sample.questions[0].expected) == 1.0
    assert sample.questions[0].ask
    assert sample.questions[0].expected.strip('"') not in sample.questions[0].ask
    assert sample.questions[0].wrong or kind == "gsm8k"
    if kind == "ruler":
        assert sample.text == "Some text.\nMore text."


def test_real_data_if_it_is_there() -> None:
    folder = Path(os.environ.get("KEEPKV_DATA", ""))
    if not os.environ.get("KEEPKV_DATA"):
        pytest.skip("KEEPKV_DATA names no folder with the real samples")
    for file in (*folder.glob("xquad*.json"), *folder.glob("kv-retrieval*.jsonl.gz")):
        sample = registry.from_file(str(file)).make(draw(0, tokens=500))
        assert all(q.score(q.expected) == 1 and q.expected.strip('"') in sample.text for q in sample.questions)


def test_settings_are_toml_and_come_back(tmp_path: Path) -> None:
    config = replace(Config(), tasks=("needle",), haystack='odd "name"\t\\é', question_aware=True)
    (tmp_path / "config.toml").write_text(written(config))
    assert load(tmp_path / "config.toml") == config
    with pytest.raises(InputError, match="did you mean 'samples'"):
        changed(config, {"sample": 3})
    with pytest.raises(InputError, match="expected a list of whole numbers"):
        changed(config, {"lengths": ["many"]})


def test_a_mean_lies_in_its_interval_as_often_as_it_should() -> None:
    rng = np.random.default_rng(1)
    for truth, texts, least in ((0.9, 6, 0.9), (0.6, 6, 0.88), (0.6, 40, 0.9)):
        found = [combined([[[(float(x), 1.0)] for x in rng.random(texts) < truth] for _ in range(4)]) for _ in range(100)]
        hits = sum(each.low <= truth <= each.high for each in found)
        assert least <= hits / 100, (truth, texts)
    wide = float(np.mean([each.high - each.low for each in found]))
    assert wide < 0.2, "many texts give a narrow interval"
    doubled = combined([[[(x, 1.0), (x, 1.0)] for x in (0.0, 1.0, 0.0, 1.0)]])
    assert doubled == combined([[[(x, 1.0)] for x in (0.0, 1.0, 0.0, 1.0)]]), "questions of one text are drawn together"
    (one, four, many) = (combined([[[(1.0, 1.0)]] * n]) for n in (1, 4, 40))
    assert one.low < four.low < many.low < many.high == 1.0, "agreement of a few says little"
    assert not combined([[[(0.5, 1.0)]]], (-1.0, 1.0)).apart, "one text ranks nobody"
    assert combined([[[(0.0, 0.0)]]]) is None


def record(method: str, sample: int, score: float, **more: object) -> Record:
    budget = "100%" if method == "full" else "10%"
    fields = {"kv_bytes": 10, "kv_bytes_full": 100, **more}
    return Record("m", "t", 512, sample, 0, method, budget, prompt=f"{sample}", score=score, **fields)


def test_ranks_only_where_intervals_separate_and_failures_count() -> None:
    full = [record("full", i, 1.0) for i in range(12)]
    good, bad = ([record(name, i, float(i % 12 < hits)) for i in range(12)] for name, hits in (("good", 11), ("bad", 2)))
    close = [record("close", i, float(i % 12 != 3)) for i in range(12)]
    found = summary.summarise([*full, *good, *bad, *close])
    rank = {row.method: row.rank for row in found.rows if row.task == summary.ALL and row.method != "full"}
    assert rank == {"good": 1, "close": 1, "bad": 3}
    apart = {(v.first, v.second): v.apart for v in found.versus}
    assert apart == {("bad", "close"): True, ("bad", "good"): True, ("close", "good"): False}
    lost = [replace(r, failed="OSError: gone", score=0.0) if r.sample < 6 else r for r in good]
    row = next(r for r in summary.summarise([*full, *lost]).rows if r.method == "good" and r.task == "t")
    assert (row.failed, row.questions) == (6, 12)
    assert row.retained.value == pytest.approx(5 / 12, abs=1e-5)
    assert ranks(["a", "b"], {}) == {"a": 1, "b": 1}


@pytest.fixture(scope="module")
def host(folder: str) -> Host:
    from keepkv.models import loading

    return Host(*loading.load(folder, "cpu", "auto"), Config(model=folder, **SMALL, written=40, period=64))


@pytest.mark.parametrize("name", registry.TASKS)
def test_every_task_runs_and_the_full_cache_is_the_yardstick(name: str, host: Host) -> None:
    config = replace(host.config, tasks=(name,))
    job = running.Job(name, 600, 0, tuple(running.variants(config)))
    found = {group[0].method: group for group in measured(host._replace(config=config), job)}
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


def test_the_full_caches_likelihoods_are_those_of_plain_transformers(host: Host) -> None:
    import torch

    from keepkv.text.prompt import Prompt

    config = replace(host.config, tasks=("needle",))
    job = running.Job("needle", 600, 1, (("full", "100%"),))
    (found,) = next(measured(host._replace(config=config), job))
    sample = sampled(host, registry.TASKS["needle"], 600, 1)
    prompt, question = Prompt(host.tokenizer, sample.text), sample.questions[0]
    answer = host.tokens(question.wrong[1])
    ids = torch.cat([prompt.text, prompt.question(question.ask), answer], 1)
    logits = host.model(ids).logits[0, -answer.shape[1] - 1 : -1].float().log_softmax(-1)
    assert found.chances[2] == pytest.approx(float(logits.gather(1, answer[0, :, None]).mean()), abs=1e-4)


def test_question_aware_and_by_answer(host: Host) -> None:
    config = replace(host.config, question_aware=True, by="answer", max_new_tokens=4)
    (found,) = next(measured(host._replace(config=config), running.Job("json", 500, 0, (("snapkv", "25%"),))))
    assert not found.failed
    assert set(found.measures) == {"name", "job", "town", "born"}
    plain = replace(config, question_aware=False)
    (other,) = next(measured(host._replace(config=plain), running.Job("json", 500, 0, (("snapkv", "25%"),))))
    assert found.tokens > other.tokens + 100
    assert found.prompt == other.prompt


def test_what_fails_is_recorded(host: Host) -> None:
    job = running.Job("needle", 500, 0, (("full", "100%"), ("snapkv", "2"), ("streaming", "25%")))
    full, low, fine = (group[0] for group in measured(host, job))
    assert (full.failed, fine.failed) == ("", "")
    assert low.failed.startswith("BudgetError: ")
    assert low.prompt == full.prompt
    long = running.Job("needle", 10**6, 0, (("full", "100%"),))
    assert next(measured(host, long))[0].failed.startswith("InputError: the haystack has")


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
    args = ["--model", folder, "--haystack", LOG, *ARGS]
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
    stripped = [[replace(r, seconds={}) for r in records.load(place)] for place in (whole, torn)]
    assert stripped[0] == stripped[1]
    before = file.read_bytes()
    assert run(monkeypatch, capsys, "eval", str(torn))[0] == 0
    assert file.read_bytes() == before or records.load(torn) == records.load(torn), "nothing is done twice"
    status, _, said = run(monkeypatch, capsys, "eval", str(torn), "--seed", "5")
    assert status == 2
    assert "has seed = 0, not 5" in said
    status, out, _ = run(monkeypatch, capsys, "eval", str(torn), "--methods", "snapkv", "--json")
    assert status == 0
    assert {row["method"] for row in json.loads(out)["rows"]} == {"full", "snapkv", "streaming"}


def test_two_processes_come_to_the_same_summary(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    args = ["--model", folder, "--haystack", LOG, "--tasks", "needle,json", "--methods", "snapkv", "--budgets", "25%"]
    args += ["--lengths", "300", "--samples", "2"]
    for name, more in (("one", []), ("two", ["--workers", "2", "--device", "cpu"])):
        assert run(monkeypatch, capsys, "eval", str(tmp_path / name), *args, *more)[0] == 0
    assert (tmp_path / "one" / "summary.json").read_bytes() == (tmp_path / "two" / "summary.json").read_bytes()
