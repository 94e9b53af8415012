"""The command line on a tiny model in a folder: output that pipes, and one clear line for every mistake."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import run
from keepkv import methods
from keepkv.cli import app
from keepkv.methods import METHODS, registry

TEXT = "The quick brown fox jumps over the lazy dog, and the dog looks at the fox without getting up. " * 12


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


def test_ask_prints_one_json_object(monkeypatch, capsys, folder: str, text: str) -> None:
    args = ["ask", text, "Who jumps?", "Who looks?", "--model", folder, "--compare", "full,snapkv", "--json"]
    status, out, err = run(monkeypatch, capsys, *args, "--max-new-tokens", "5", "--budget", "20%")
    assert (status, err) == (0, "")
    result = json.loads(out)
    wanted = {"model", "method", "budget", "tokens", "slots", "kv_bytes_full", "kv_bytes", "answers"}
    wanted |= {"prefill_seconds", "compress_seconds", "decode_tokens_per_second"}
    assert wanted <= result.keys()
    assert result["method"] == "keepkv"
    assert [answer["question"] for answer in result["answers"]] == ["Who jumps?", "Who looks?"]
    assert [other["method"] for other in result["compare"]] == ["full", "snapkv"]
    assert result["slots"] == pytest.approx(0.2 * result["tokens"], rel=0.01)
    assert result["kv_bytes"] < 0.25 * result["kv_bytes_full"]
    full = result["compare"][0]
    assert full["kv_bytes"] == full["kv_bytes_full"] == result["kv_bytes_full"]
    assert full["alike"] == 1.0


def test_ask_finds_a_budget_and_the_others_get_as_much(monkeypatch, capsys, folder: str, text: str) -> None:
    args = ["ask", text, "Who jumps?", "--model", folder, "--compare", "full,snapkv", "--json", "--max-new-tokens", "2"]
    slots = []
    for tolerance in ("0.001", "0.3"):
        status, out, err = run(monkeypatch, capsys, *args, "--budget", "auto", "--tolerance", tolerance)
        assert (status, err) == (0, "")
        result = json.loads(out)
        assert result["budget"] == result["compare"][1]["budget"] != "auto"
        assert result["slots"] == pytest.approx(result["compare"][1]["slots"], rel=0.01)
        slots.append(result["slots"])
    assert slots[0] > slots[1]


def test_ask_reads_in_chunks(monkeypatch, capsys, folder: str, text: str) -> None:
    """The same budget whatever the way of reading; every method reads for itself, and the full cache stays full."""
    args = ["ask", text, "Who jumps?", "--model", folder, "--compare", "full,snapkv", "--json", "--max-new-tokens", "3"]
    found = []
    for more in ([], ["--chunk", "64"], ["--chunk", "64", "--repeat", "always"]):
        status, out, err = run(monkeypatch, capsys, *args, "--budget", "20%", "--keep", "quick", *more)
        assert (status, err) == (0, "")
        found.append(json.loads(out))
    once, chunked, repeated = found
    assert chunked["slots"] == repeated["slots"] == once["slots"]
    assert repeated["repeated"] is True
    assert chunked["compare"][0]["kv_bytes"] == once["kv_bytes_full"]
    assert chunked["compare"][0]["answers"] == once["compare"][0]["answers"]
    assert 0 < chunked["alike"] <= 1


def test_ask_keeps_what_a_pattern_matches(monkeypatch, capsys, folder: str, text: str) -> None:
    args = ["ask", text, "Who jumps?", "--model", folder, "--max-new-tokens", "2", "--json", "--budget", "10%"]
    assert run(monkeypatch, capsys, *args, "--keep", "without")[0] == 0
    status, _, err = run(monkeypatch, capsys, *args, "--keep", "quick|fox|dog|the|over")
    assert status == 2
    assert "must stay in every head" in err


def test_spans_cover_what_is_matched(folder: str) -> None:
    from keepkv.models import loading
    from keepkv.text.prompt import Prompt

    _, tokenizer = loading.load(folder, "cpu", "auto")
    prompt = Prompt(tokenizer, TEXT)
    spans = prompt.spans(r"lazy dog\b")
    assert len(spans) == 12
    for first, last in spans:
        assert "lazy dog" in tokenizer.decode(prompt.text[0, first:last])
        assert "lazy dog" not in tokenizer.decode(prompt.text[0, first + 1 : last])
        assert "lazy dog" not in tokenizer.decode(prompt.text[0, first : last - 1])


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
    assert "Smaller: 9." in joined
    assert "Alike: " in joined
    assert joined.index("Smaller:") < joined.index("Alike:")


def test_a_restored_cache_answers_as_if_asked_first(monkeypatch, capsys, folder: str, text: str) -> None:
    one = ["ask", text, "Who jumps?", "--model", folder, "--json", "--max-new-tokens", "6"]
    alone = json.loads(run(monkeypatch, capsys, *one)[1])["answers"][0]
    after = ["ask", text, "What is the meaning of all this?", "Who jumps?", *one[3:]]
    assert json.loads(run(monkeypatch, capsys, *after)[1])["answers"][1] == alone


def test_slots_may_be_quantised_by_every_command(monkeypatch, capsys, folder: str, text: str, tmp_path: Path) -> None:
    tail = ["--model", folder, "--json"]
    ask = ["ask", text, "Who jumps?", *tail, "--max-new-tokens", "2", "--compare", "full"]
    plain, small = (json.loads(run(monkeypatch, capsys, *ask, "--slot-dtype", name)[1]) for name in ("float", "int4"))
    assert (small["slot_dtype"], small["compare"][0]["slot_dtype"]) == ("int4", "float")
    assert small["slots"] == plain["slots"]
    assert small["kv_bytes"] < 0.3 * plain["kv_bytes"]
    file = str(tmp_path / "text.keep")
    status, out, err = run(monkeypatch, capsys, "compile", text, "-o", file, *tail, "--slot-dtype", "int8")
    assert (status, err, json.loads(out)["slot_dtype"]) == (0, "", "int8")
    loaded = json.loads(run(monkeypatch, capsys, "ask", file, "Who jumps?", "--json", "--max-new-tokens", "2")[1])
    assert (loaded["slot_dtype"], loaded["kv_bytes"]) == ("int8", json.loads(out)["kv_bytes"])
    assert "--slots is for texts" in run(monkeypatch, capsys, "ask", file, "Who?", "--slot-dtype", "int8")[2]
    measure = ["fidelity", text, *tail, "--methods", "snapkv", "--segments", "1", "--context-tokens", "64"]
    status, out, err = run(monkeypatch, capsys, *measure, "--slot-dtype", "float,int8,int4", "--budgets", "25%")
    assert (status, err) == (0, "")
    sizes = {record["slot_dtype"]: record["kv_bytes"] for record in json.loads(out)}
    assert list(sizes) == ["float", "int8", "int4"]
    assert sizes["float"] > sizes["int8"] > sizes["int4"]
    status, _, err = run(monkeypatch, capsys, "chat", "--model", folder, "--slot-dtype", "int44")
    assert (status, "did you mean 'int4'" in err) == (2, True)


def test_fidelity_records(monkeypatch, capsys, folder: str, text: str) -> None:
    args = ["fidelity", text, "--model", folder, "--methods", "keepkv,full,h2o", "--budgets", "25%,50%", "--json"]
    sizes = ["--segments", "2", "--context-tokens", "300", "--continuation-tokens", "40"]
    status, out, err = run(monkeypatch, capsys, *args, *sizes)
    assert (status, err) == (0, "")
    records = {(r["method"], r["budget"]): r for r in json.loads(out)}
    assert len(records) == 6
    wanted = {"method", "budget", "delta_nll", "kl", "top1", "kv_bytes", "kv_bytes_full", "compress_seconds", "prefill_seconds"}
    assert all(wanted <= record.keys() for record in records.values())
    full = records["full", "25%"]
    assert (full["delta_nll"], full["kl"], full["top1"]) == (0.0, 0.0, 1.0)
    assert 0 < records["keepkv", "50%"]["kl"] < records["keepkv", "25%"]["kl"]
    assert records["keepkv", "25%"]["kv_bytes"] < 0.3 * full["kv_bytes_full"]


def test_tables_for_people(monkeypatch, capsys, folder: str, text: str) -> None:
    args = ["fidelity", text, "--model", folder, "--methods", "streaming", "--segments", "1", "--context-tokens", "64"]
    assert "top-1" in run(monkeypatch, capsys, *args, "--continuation-tokens", "8")[1]
    assert "AAAI" in run(monkeypatch, capsys, "methods")[1] or "2504.09936" in run(monkeypatch, capsys, "methods")[1]
    names = [row["name"] for row in json.loads(run(monkeypatch, capsys, "methods", "--json")[1])]
    assert names[0] == "full"
    assert names[-1] == "keepkv"


MISTAKES = [
    (["ask", "nowhere.txt", "?"], "cannot be read (No such file"),
    (["ask", "{binary}", "?"], "is not UTF-8 text"),
    (["ask", "{zeros}", "?"], "is a binary file"),
    (["ask", "{empty}", "?"], "is empty"),
    (["ask", "{folder}", "?"], "cannot be read (Is a directory"),
    (["ask", "{text}", "?", "--method", "snapkw"], "did you mean 'snapkv'"),
    (["ask", "{text}", "?", "--compare", "full,nothing"], "unknown method 'nothing'"),
    (["ask", "{text}", "?", "--budget", "1.5"], "outside its range"),
    (["ask", "{text}", "?", "--budget", "lots"], "cannot be read: expected a fraction"),
    (["ask", "{text}", "?", "--budget", "3"], "fewer than the 4 that must be kept"),
    (["ask", "{text}", "?", "--keep", "zebra"], "nothing in the text matches 'zebra'"),
    (["ask", "{text}", "?", "--keep", "("], "not a regular expression"),
    (["ask", "{text}", "?", "--budget", "auto", "--method", "snapkv"], "snapkv does not predict its own error"),
    (["ask", "{text}", "?", "--budget", "auto", "--tolerance", "2"], "tolerance 2: expected the share"),
    (["ask", "{text}", "?", "--budget", "1kB"], "give at least"),
    (["ask", "{text}", "?", "--model", "smollm3"], "did you mean 'smollm2'"),
    (["ask", "{text}", "?", "--model", "./nowhere"], "does not exist"),
    (["ask", "{text}", "?", "--model", "{here}"], "holds no model"),
    (["ask", "{text}", "?", "--model", "nobody/nothing"], "cannot be loaded"),
    (["ask", "{text}", "?", "--device", "cuda:77"], "is not there: expected one of cpu"),
    (["ask", "{text}", "?", "--device", "toaster"], "is not there: expected one of cpu"),
    (["ask", "{text}", "?", "--dtype", "float31"], "unknown dtype"),
    (["ask", "{text}"], "Missing argument"),
    (["ask", "{text}", "?", " "], "one of the questions is empty"),
    (["ask", "{text}", "?", "--chunk", "64", "--budget", "auto"], "--chunk 0"),
    (["chat", "--budget", "lots"], "cannot be read: expected a fraction"),
    (["chat", "--load", "{folder}/nowhere.json"], "cannot be read (No such file"),
    (["inspect", "{text}", "--budget", "100%"], "there is nothing to inspect (left whole"),
    (["inspect", "{text}", "--html", "{folder}/nowhere/page.html"], "expected a file name in a folder that exists"),
    (["inspect", "{text}", "--png", "{here}"], "expected a file name in a folder that exists"),
    (["inspect", "{text}", "--method", "keepkw"], "did you mean 'keepkv'"),
    (["fidelity", "{text}", "--context-tokens", "100000"], "fewer than the 100000 + 192 needed"),
    (["fidelity", "{text}", "--budgets", ","], "give at least one method and one budget"),
    (["fidelity", "{text}", "--segments", "0"], "Invalid value"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_mistakes_get_one_clear_line_and_status_2(monkeypatch, capsys, folder, text, tmp_path, args, message) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    for name, content in {"binary": b"\xff\xfe\x00\x81", "zeros": b"a\0b", "empty": b" \n"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "here").mkdir()
    places = {name: str(tmp_path / name) for name in ("binary", "zeros", "empty", "here")}
    args = [arg.format(text=text, folder=folder, **places) for arg in args]
    if "--model" not in args:
        args += ["--model", folder]
    status, out, err = run(monkeypatch, capsys, *args)
    assert status == 2
    assert out == ""
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    if "Usage" not in err:
        assert err.count("\n") == 1


def test_debug_shows_the_trace(monkeypatch, capsys) -> None:
    from keepkv import InputError

    monkeypatch.setattr(sys, "argv", ["keepkv", "ask", "nowhere.txt", "?", "--debug"])
    with pytest.raises(InputError):
        app.main()


def test_a_text_beyond_the_trained_length_is_warned_about(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text(TEXT * 5)
    status, _, err = run(monkeypatch, capsys, "ask", str(file), "?", "--model", folder, "--max-new-tokens", "2")
    assert status == 0
    assert "trained for 4,096" in " ".join(err.split())


def test_help_and_version_do_not_wait_for_torch(monkeypatch, capsys) -> None:
    code = "import sys; sys.argv = ['keepkv', '--version']\nfrom keepkv import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True, stdout=subprocess.DEVNULL)
    assert time.perf_counter() - start < 30  # a hang, not a timing
    assert "before" in run(monkeypatch, capsys, "ask", "--help")[1]


README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_commands_of_the_readme_exist(monkeypatch, capsys) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    lines = re.findall(r"^(?:cat [^|]*\| )?keepkv (.*?)(?: \||  #|$)", README, re.MULTILINE)
    assert len(lines) >= 5
    for words in map(shlex.split, lines):
        helped = run(monkeypatch, capsys, words[0], "--help")[1]
        assert all(word in helped for word in words if word.startswith("--")), words


def test_the_python_of_the_readme_runs(folder: str, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    code = "\n".join(blocks).replace("your/model", folder).replace("max_new_tokens=100", "max_new_tokens=2")
    exec(code, {"long_text": TEXT, "text": TEXT})
    assert "Report(method='keepkv', budget='0.1'" in capsys.readouterr().out


def test_every_target_of_the_readme_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (Path(__file__).parent.parent / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)) <= targets


def test_methods_have_pages_and_the_committed_ones_are_up_to_date(monkeypatch, capsys, tmp_path: Path) -> None:
    status, shown, _ = run(monkeypatch, capsys, "methods", "snapkv", "keepkv")
    assert status == 0
    assert "moving mean over 5 neighbours" in shown  # the equation, as the code has it
    assert "score.py" in shown
    run(monkeypatch, capsys, "methods", "--pages", str(tmp_path))
    committed = Path(__file__).parent.parent / "docs" / "methods"
    made = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    assert set(made) == {f"{name}.md" for name in [*METHODS, "README"]}
    assert made == {path.name: path.read_text("utf-8") for path in committed.iterdir()}, "keepkv methods --pages docs/methods"
    facts = {row["name"]: row for row in json.loads(run(monkeypatch, capsys, "methods", "--json")[1])}
    assert facts["criticalkv"]["choose"] == "two_stages"
    assert facts["kvzip"]["repeats"]
    assert all(row["cost"] and row["good"] and row["bad"] and row["memory"] for row in facts.values())


def test_a_method_from_a_file_is_measured_beside_the_table(monkeypatch, capsys, folder: str, text: str) -> None:
    own = Path(__file__).parent.parent / "examples" / "own_method.py"
    args = ["fidelity", text, "--model", folder, "--methods", f"{own}:LOUD,snapkv", "--budgets", "25%", "--segments", "1"]
    monkeypatch.setattr(registry, "METHODS", dict(methods.METHODS))  # the file registers its row
    status, out, _ = run(monkeypatch, capsys, *args, "--context-tokens", "120", "--continuation-tokens", "16", "--json")
    assert status == 0
    assert [row["method"] for row in json.loads(out)] == ["loud", "snapkv"]
    status, _, said = run(monkeypatch, capsys, "fidelity", text, "--methods", f"{own}:LOUD,{own}:QUIET")
    assert status == 2
    assert "QUIET" in said
