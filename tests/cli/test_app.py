"""The command line on a tiny model in a folder: one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import run
from keepkv.cli import app


def test_slots_may_be_quantized_by_every_command(monkeypatch, capsys, folder: str, text: str, tmp_path: Path) -> None:
    tail = ["--model", folder, "--json"]
    ask = ["ask", text, "Who jumps?", *tail, "--max-new-tokens", "2", "--compare", "full"]
    plain, small = (json.loads(run(monkeypatch, capsys, *ask, "--slot-dtype", name)[1]) for name in ("float", "int4"))
    assert (small["slot_dtype"], small["compare"][0]["slot_dtype"]) == ("int4", "float")
    assert small["slots_per_head"] == plain["slots_per_head"]
    assert small["kv_bytes"] < 0.3 * plain["kv_bytes"]
    file = str(tmp_path / "text.keep")
    status, out, err = run(monkeypatch, capsys, "compile", text, "-o", file, *tail, "--slot-dtype", "int8")
    assert (status, err, json.loads(out)["slot_dtype"]) == (0, "", "int8")
    loaded = json.loads(run(monkeypatch, capsys, "ask", file, "Who jumps?", "--json", "--max-new-tokens", "2")[1])
    assert (loaded["slot_dtype"], loaded["kv_bytes"]) == ("int8", json.loads(out)["kv_bytes"])
    assert "--slot-dtype is for texts" in run(monkeypatch, capsys, "ask", file, "Who?", "--slot-dtype", "int8")[2]
    measure = ["fidelity", text, *tail, "--methods", "snapkv", "--segments", "1", "--context-tokens", "64"]
    status, out, err = run(monkeypatch, capsys, *measure, "--slot-dtype", "float,int8,int4", "--budgets", "25%")
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
    (["fidelity", "{text}", "--budgets", ","], "--budgets: nothing to do: give at least one"),
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


def test_help_does_not_wait_for_torch(monkeypatch, capsys) -> None:
    code = "import sys; sys.argv = ['keepkv', '--help']\nfrom keepkv import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True, stdout=subprocess.DEVNULL)
    assert time.perf_counter() - start < 30  # a hang, not a timing
    assert "before" in run(monkeypatch, capsys, "ask", "--help")[1]
