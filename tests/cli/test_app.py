"""The command line on a tiny model in a folder: one clear line for every mistake."""

from __future__ import annotations

import json
import operator
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer

from helpers import run
from keepkv.cli import app


def test_slots_may_be_quantized_by_every_command(monkeypatch, capsys, folder: str, text: str, tmp_path: Path) -> None:
    tail = ["--model", folder, "--json"]
    ask = ["ask", text, "Who jumps?", *tail, "--max-new-tokens", "2", "--compare", "full"]
    plain, small = (json.loads(run(monkeypatch, capsys, *ask, "--slot-dtype", name)[1]) for name in ("float", "int4"))
    assert (small["slot_dtype"], small["compare"][0]["slot_dtype"]) == ("int4", "float")
    assert small["slots_per_head"] > 2.5 * plain["slots_per_head"]  # a share is one of bytes
    assert small["kv_bytes"] <= plain["kv_bytes"]
    file = str(tmp_path / "text.keep")
    status, out, err = run(monkeypatch, capsys, "compile", text, "-o", file, *tail, "--slot-dtype", "int8")
    assert (status, err, json.loads(out)["slot_dtype"]) == (0, "", "int8")
    loaded = json.loads(run(monkeypatch, capsys, "ask", file, "Who jumps?", "--json", "--max-new-tokens", "2")[1])
    assert (loaded["slot_dtype"], loaded["kv_bytes"]) == ("int8", json.loads(out)["kv_bytes"])
    assert "--slot-dtype is for texts" in run(monkeypatch, capsys, "ask", file, "Who?", "--slot-dtype", "int8")[2]
    measure = ["fidelity", text, *tail, "--methods", "snapkv", "--segments", "1", "--context-tokens", "64"]
    status, out, err = run(monkeypatch, capsys, *measure, "--slot-dtype", "float,int8,int4", "--budgets", "16")
    assert (status, err) == (0, "")
    sizes = {record["slot_dtype"]: record["kv_bytes"] for record in json.loads(out)}
    assert list(sizes) == ["float", "int8", "int4"]
    assert sizes["float"] > sizes["int8"] > sizes["int4"]
    status, _, err = run(monkeypatch, capsys, "chat", "--model", folder, "--slot-dtype", "int44")
    assert (status, "did you mean 'int4'" in err) == (2, True)


MISTAKES = [
    (["ask", "nowhere.txt", "?"], "cannot be read (No such file"),
    (["ask", "{binary}", "?"], "is not UTF-8 text"),
    (["ask", "{zeros}", "?"], "is a binary file"),
    (["ask", "{empty}", "?"], "is empty"),
    (["ask", "{folder}", "?"], "cannot be read (Is a directory"),
    (["ask", "{text}", "?", "--method", "snapkw"], "did you mean 'snapkv'"),
    (["ask", "{text}", "?", "--compare", "full,nothing"], "unknown method 'nothing'"),
    (["ask", "{text}", "?", "--budget", "1.5"], "outside its range"),
    (["ask", "{text}", "?", "--budget", "lots"], "cannot be read: expected a share"),
    (["ask", "{text}", "?", "--budget", "3"], "fewer than the 4 that must be kept"),
    (["ask", "{text}", "?", "--budget", "0"], "fewer than the 4 that must be kept: give at least 4"),
    (["ask", "{text}", "?", "--method", "own.py"], "name the method in it too, as in own.py:NAME"),
    (["ask", "{text}", "?", "report.keep"], "give all .keep files first, then the questions"),
    (["ask", "nowhere.keep", "?"], "expected a file made by keepkv compile"),
    (["inspect", "{text}", "--budget", "auto"], "only for keepkv ask"),
    (["chat", "--budget", "auto"], "only for keepkv ask"),
    (["chat", "--budget", "3"], "fewer than the 4 that must be kept"),
    (["serve", "--budget", "0"], "fewer than the 4 that must be kept"),
    (["compile", "{text}", "-o", "{text}"], "would overwrite its text"),
    (["ask", "{text}", "?", "--keep", "zebra"], "nothing in the text matches 'zebra'"),
    (["ask", "{text}", "?", "--keep", "("], "not a regular expression"),
    (["ask", "{text}", "?", "--budget", "auto", "--method", "snapkv"], "snapkv does not predict its own error"),
    (["ask", "{text}", "?", "--budget", "auto", "--tolerance", "2"], "tolerance 2: expected the share"),
    (["ask", "{text}", "?", "--tolerance", "0.1"], "--tolerance is for --budget auto"),
    (["ask", "nowhere.keep", "?", "--repair", "15%"], "--repair is for several compiled documents"),
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
    (["chat", "--budget", "lots"], "cannot be read: expected a share"),
    (["chat", "--load", "{folder}/nowhere.json"], "cannot be read (No such file"),
    (["inspect", "{text}", "--budget", "100%"], "there is nothing to inspect (left whole"),
    (["inspect", "{text}", "--html", "{folder}/nowhere/page.html"], "expected a file name in a folder that exists"),
    (["inspect", "{text}", "--png", "{here}"], "expected a file name in a folder that exists"),
    (["inspect", "{text}", "--method", "keepkw"], "did you mean 'keepkv'"),
    (["fidelity", "{text}", "--context-tokens", "100000"], "fewer than the 100000 + 192 needed"),
    (["fidelity", "{text}", "--budgets", ","], "--budgets is empty: give at least one name"),
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
    if "--model" not in args and args[0] != "serve":
        args += ["--model", folder]
    status, out, err = run(monkeypatch, capsys, *args)
    assert status == 2
    assert out == ""
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    if "Usage" not in err:
        assert err.count("\n") == 1


OWN_METHODS = """
from keepkv import Method

def broken(observation):
    return observation.nothing

def odd(observation):
    return observation.keys[0, 0]

BROKEN = Method("broken", "scores that cannot be computed", "", broken)
ODD = Method("odd", "scores of a wrong shape", "", odd)
"""


def test_an_error_of_a_users_own_method_is_not_called_a_bug_of_keepkv(monkeypatch, capsys, folder, text, tmp_path) -> None:
    (tmp_path / "own.py").write_text(OWN_METHODS)
    (tmp_path / "unreadable.py").write_text("BROKEN = (\n")
    ask = ("ask", text, "Who?", "--model", folder, "--budget", "20%", "--method")
    for method, message in (
        ("own.py:BROKEN", "own.py line 5: --debug"),
        ("own.py:ODD", "check what its functions return"),
        ("unreadable.py:BROKEN", "unreadable.py line 1: --debug"),
    ):
        status, out, err = run(monkeypatch, capsys, *ask, f"{tmp_path}/{method}")
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert message in err
        assert "bug in keepkv" not in err


def test_an_error_that_nobody_expects_is_called_a_bug(monkeypatch, capsys, text: str) -> None:
    monkeypatch.setattr("keepkv.models.loading.load", operator.abs)  # C code, which stands in no file
    status, out, err = run(monkeypatch, capsys, "ask", text, "Who?")
    assert (status, out) == (1, "")
    assert err.startswith("keepkv: TypeError: ")
    assert "(this is a bug in keepkv: please report it" in err


def test_without_memory_the_remedy_is_named(monkeypatch, capsys, text: str) -> None:
    def fail(file: str) -> str:
        raise MemoryError

    monkeypatch.setattr("keepkv.text.file.read_text", fail)
    assert "--chunk 2048" in run(monkeypatch, capsys, "ask", text, "Who?")[2]


def test_the_version_is_all_that_a_bug_report_needs(monkeypatch, capsys) -> None:
    status, out, err = run(monkeypatch, capsys, "--version")
    assert (status, err) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert list(facts) == ["keepkv", "python", "platform", "torch", "transformers", "triton", "attention"]
    assert facts["torch"] == torch.__version__
    assert re.match(r"(sdpa|triton|eager)\b.* on ", facts["attention"])


COMMANDS = typer.main.get_command(app.app)


def pages(command: object, *words: str) -> dict[tuple[str, ...], object]:
    """Every command, and every group of commands, by what is typed for it."""
    under = getattr(command, "commands", {})
    return {words: command} | {key: page for name in under for key, page in pages(under[name], *words, name).items()}


@pytest.mark.parametrize("words", pages(COMMANDS), ids=" ".join)
def test_every_help_has_examples_and_groups_its_options(monkeypatch, capsys, words: tuple[str, ...]) -> None:
    status, out, err = run(monkeypatch, capsys, *words, "--help")
    assert (status, err) == (0, "")
    lines = [line.strip() for line in out.splitlines()]
    summary = next(line for line in lines if line and not line.startswith("Usage"))
    assert summary[0].isupper()
    examples = [line for line in lines if "keepkv " in line and not line.startswith(("Usage", "│"))]
    assert any(line.startswith(" ".join(("keepkv", *words))) for line in examples)
    options = [param for param in pages(COMMANDS)[words].params if param.opts[0].startswith("-")]
    assert {param.name for param in options if not param.rich_help_panel} <= {"debug", "help", "version"}


def test_debug_shows_the_trace(monkeypatch, capsys) -> None:
    from keepkv import InputError

    monkeypatch.setattr(sys, "argv", ["keepkv", "ask", "nowhere.txt", "?", "--debug"])
    with pytest.raises(InputError):
        app.main()


def test_help_does_not_wait_for_torch(monkeypatch, capsys) -> None:
    code = "import sys; sys.argv = ['keepkv', '--help']\nfrom keepkv import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True, stdout=subprocess.DEVNULL)
    assert time.perf_counter() - start < 30  # a hang, not a timing
    assert "before" in run(monkeypatch, capsys, "ask", "--help")[1]
