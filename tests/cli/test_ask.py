"""keepkv ask: output that pipes, budgets, chunks and spans, and an answer of the embedded model from a tenth of its cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import FOX, LOG, run
from keepkv.lookback.words import Words

TEXT = FOX * 12


def test_ask_prints_one_json_object(monkeypatch, capsys, folder: str, text: str) -> None:
    args = ["ask", text, "Who jumps?", "Who looks?", "--model", folder, "--compare", "full,snapkv", "--json"]
    status, out, err = run(monkeypatch, capsys, *args, "--max-new-tokens", "5", "--budget", "20%")
    assert (status, err) == (0, "")
    result = json.loads(out)
    wanted = {"model", "method", "budget", "tokens", "slots_per_head", "kv_bytes_full", "kv_bytes", "answers"}
    wanted |= {"prefill_seconds", "compress_seconds", "decode_tokens_per_second"}
    assert wanted <= result.keys()
    assert result["method"] == "keepkv"
    assert [answer["question"] for answer in result["answers"]] == ["Who jumps?", "Who looks?"]
    assert [other["method"] for other in result["compare"]] == ["full", "snapkv"]
    full, snapkv = result["compare"]
    assert result["slot_dtype"] in ("int8", "int4")
    assert (full["slot_dtype"], snapkv["slot_dtype"]) == ("float", "int8"), "snapkv does not say what it loses"
    assert result["slots_per_head"] > 2 * 0.2 * result["tokens"], "a share is one of bytes"
    assert result["kv_bytes"] < 0.25 * result["kv_bytes_full"]
    assert full["kv_bytes"] == full["kv_bytes_full"] == result["kv_bytes_full"]
    assert full["alike"] == 1.0


def test_ask_looks_back_and_shows_at_what(monkeypatch, capsys, folder: str, text: str, tmp_path: Path) -> None:
    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path))
    monkeypatch.setattr("keepkv.lookback.look_back.FLAT", 0.0)
    args = ["ask", text, "Who jumps?", "--model", folder, "--max-new-tokens", "3", "--budget", "20%", "--lookback", "128"]
    status, out, err = run(monkeypatch, capsys, *args, "--json", "--compare", "full")
    assert (status, err) == (0, "")
    result = json.loads(out)
    (answer,) = result["answers"]
    sources = answer["looked_back"]
    assert 64 <= sources["tokens"] <= 128
    assert sources["bytes"] > 0 < sources["index_bytes"] == result["index_bytes"]
    assert sources["ranked_by"] == (["index", "words"] if Words.available() else ["index"])
    ((first, last),) = sources["spans"]
    assert last - first == sources["tokens"]
    assert len(sources["texts"]) == 1
    assert sources["texts"][0].removeprefix("<|user|>") in FOX * 12
    assert result["compare"][0]["answers"][0]["looked_back"]["tokens"] == 0, "a full cache has nothing to look back at"
    status, out, err = run(monkeypatch, capsys, *args, "--sources")
    assert (status, err) == (0, "")
    assert f"tokens {first:,} to {last - 1:,}: " in out
    assert "looking back" in out


@pytest.mark.parametrize("wrong", [["--lookback", "63"], ["--lookback", "on"], ["--sources", "--lookback", "off"]])
def test_a_lookback_that_cannot_be_is_refused(monkeypatch, capsys, folder: str, text: str, wrong: list[str]) -> None:
    status, _, err = run(monkeypatch, capsys, "ask", text, "Who?", "--model", folder, *wrong)
    assert status == 2
    assert "lookback" in err


def test_what_looks_like_markup_is_shown_as_it_is(monkeypatch, capsys, folder: str, text: str) -> None:
    """Brackets are not read as rich's markup, which would hide them, or end the program."""
    args = ["ask", text, "What is [bold]x[/red]?", "--model", folder, "--max-new-tokens", "2", "--budget", "20%"]
    status, out, err = run(monkeypatch, capsys, *args)
    assert (status, err) == (0, "")
    assert "[bold]x[/red]?" in " ".join(out.split())


def test_ask_finds_a_budget_and_the_others_get_as_much(monkeypatch, capsys, folder: str, text: str) -> None:
    args = ["ask", text, "Who jumps?", "--model", folder, "--compare", "full,snapkv", "--json", "--max-new-tokens", "2"]
    slots = []
    for tolerance in ("0.00001", "0.3"):
        status, out, err = run(monkeypatch, capsys, *args, "--budget", "auto", "--tolerance", tolerance)
        assert (status, err) == (0, "")
        result = json.loads(out)
        assert result["budget"] == result["compare"][1]["budget"] != "auto"
        assert result["kv_bytes"] == pytest.approx(result["compare"][1]["kv_bytes"], rel=0.02)
        slots.append(result["slots_per_head"])
    assert slots[0] > slots[1]


def test_ask_reads_in_chunks(monkeypatch, capsys, folder: str, text: str) -> None:
    """The same budget whatever the way of reading; every method reads for itself, and the full cache stays full."""
    args = ["ask", text, "Who jumps?", "--model", folder, "--compare", "full,snapkv", "--json", "--max-new-tokens", "3"]
    found = []
    for more in ([], ["--chunk", "64"], ["--chunk", "64", "--repeat", "always"]):
        options = ["--budget", "20%", "--slot-dtype", "int8", "--keep", "quick", *more]
        status, out, err = run(monkeypatch, capsys, *args, *options)
        assert (status, err) == (0, "")
        found.append(json.loads(out))
    once, chunked, repeated = found
    assert chunked["slots_per_head"] == repeated["slots_per_head"] == once["slots_per_head"]
    assert repeated["repeated"] is True
    assert chunked["compare"][0]["kv_bytes"] == once["kv_bytes_full"]
    assert chunked["compare"][0]["answers"] == once["compare"][0]["answers"]
    assert 0 < chunked["alike"] <= 1


def test_ask_keeps_what_a_pattern_matches(monkeypatch, capsys, folder: str, text: str) -> None:
    args = ["ask", text, "Who jumps?", "--model", folder, "--max-new-tokens", "2", "--json", "--budget", "5%"]
    assert run(monkeypatch, capsys, *args, "--keep", "without")[0] == 0
    status, _, err = run(monkeypatch, capsys, *args, "--keep", "quick|fox|dog|the|over")
    assert status == 2
    assert "must stay in every head" in err


def test_ask_reads_standard_input_and_answers_alike_twice(folder: str) -> None:
    command = [sys.executable, "-m", "keepkv", "ask", "-", "Who?", "--model", folder, "--json", "--max-new-tokens", "6"]
    answers = []
    for _ in range(2):
        done = subprocess.run(command, input=TEXT.encode(), capture_output=True, check=True)
        answers.append(json.loads(done.stdout)["answers"])
    assert answers[0] == answers[1]


def test_ask_ends_with_how_small_and_how_alike(monkeypatch, capsys, folder: str, text: str) -> None:
    args = ["ask", text, "Who jumps?", "--model", folder, "--compare", "full", "--max-new-tokens", "4"]
    status, out, _ = run(monkeypatch, capsys, *args)
    assert status == 0
    joined = " ".join(out.split())
    assert "Smaller: 10." in joined
    assert "Alike: " in joined
    assert joined.index("Smaller:") < joined.index("Alike:")


def test_a_restored_cache_answers_as_if_asked_first(monkeypatch, capsys, folder: str, text: str) -> None:
    one = ["ask", text, "Who jumps?", "--model", folder, "--json", "--max-new-tokens", "6"]
    alone = json.loads(run(monkeypatch, capsys, *one)[1])["answers"][0]
    after = ["ask", text, "What is the meaning of all this?", "Who jumps?", *one[3:]]
    assert json.loads(run(monkeypatch, capsys, *after)[1])["answers"][1] == alone


def test_a_text_beyond_the_trained_length_is_warned_about(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text(TEXT * 5)
    status, _, err = run(monkeypatch, capsys, "ask", str(file), "?", "--model", folder, "--max-new-tokens", "2")
    assert status == 0
    assert "trained for 4,096" in " ".join(err.split())


def test_ask_answers_from_a_tenth(tmp_path: Path) -> None:
    """A fact in the middle of a text of some 1,000 tokens, asked after compression, in a process of its own."""
    words = LOG.read_text().split()
    text = tmp_path / "text.txt"
    fact = "The serial number of the professor's microscope is 8213506."
    text.write_text(f"{' '.join(words[:350])} {fact} {' '.join(words[350:700])}")
    question = "What is the serial number of the professor's microscope?"
    command = [
        sys.executable,
        "-m",
        "keepkv",
        "ask",
        str(text),
        question,
        "--json",
        "--compare",
        "full",
        "--max-new-tokens",
        "24",
    ]
    result = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert 9 < result["kv_bytes_full"] / result["kv_bytes"] < 10.5
    assert "8213506" in result["compare"][0]["answers"][0]["answer"]
    assert "8213506" in result["answers"][0]["answer"]
