"""keepkv chat: the terminal that leads a conversation."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import converse, run
from keepkv.cli import app
from keepkv.cli.chat import Chat


def test_every_command_does_what_it_says(model_and_tokenizer, capsys, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("A note to be read aloud, with a few words more than that.")
    chat = Chat(lambda: converse(model_and_tokenizer), 8, 0.0)
    chat.run(iter([
        "/report", "Hello\n", "/report", "/read " + str(tmp_path / "note.txt"), "/undo", "/budget", "/budget 20", "/report",
        f"/save {tmp_path / 'c.json'}", "/clear", f"/load {tmp_path / 'c.json'}", "/history", "/help", "", "/reprot", "/save",
        "/budget lots", "/load nowhere.json", "/quit", "never said",
    ]))  # fmt: skip
    said = capsys.readouterr()
    assert "nothing has been read yet" in said.out
    assert "taken back: A note" in said.out
    assert "budget 40" in said.out
    assert "held: 20 slots per KV head" in said.out
    assert "1 turns" in said.out
    assert "Hello" in said.out
    for message in ("did you mean 'report'", "the file name is missing", "cannot be read: expected a share", "nowhere.json"):
        assert message in said.err
    assert len(chat.talk.turns) == 1


def test_chat_talks_through_a_pipe(monkeypatch, capsys, folder: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/report\n"))
    monkeypatch.setattr(sys, "argv", ["keepkv", "chat", "--model", folder, "--max-new-tokens", "5", "--budget", "30"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code in (0, None)
    assert "tokens in 1 turns" in capsys.readouterr().out


def test_a_line_that_is_no_text_ends_the_line_and_not_the_chat(monkeypatch, capsys, folder: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n/report\n"), encoding="utf-8"))
    status, out, err = run(monkeypatch, capsys, "chat", "--model", folder, "--max-new-tokens", "3")
    assert status == 0
    assert "not UTF-8" in " ".join(err.split())
    assert "nothing has been read yet" in out


def test_a_compression_that_is_interrupted_changes_neither_budget_nor_cache(model_and_tokenizer, monkeypatch, capsys) -> None:
    chat = Chat(lambda: converse(model_and_tokenizer), 8, 0.0)
    chat.run(iter(["Hello, this is a line of some length to be compressed, and a little more of it"]))
    before = chat.talk.cache.fork()

    def interrupted(*_: object) -> None:
        chat.talk.cache.keep_layers[0].slots = None  # half-way
        raise KeyboardInterrupt

    monkeypatch.setattr("keepkv.cache.cache.KeepCache._settle", interrupted)
    chat.run(iter(["/budget 10"]))
    assert chat.talk.cache.policy.budget_text == before.policy.budget_text == "40"
    held = [layer.slots and layer.slots.counts for layer in chat.talk.cache.keep_layers]
    assert held == [layer.slots and layer.slots.counts for layer in before.keep_layers]
    assert held[0]
    assert "stopped" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_not_the_program(folder: str) -> None:
    """A real process: interrupted while it answers at length, it goes on to the next line."""
    command = [sys.executable, "-m", "keepkv", "chat", "--model", folder, "--max-new-tokens", "3000", "--budget", "2000"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        process.stdin.write("Hello\n")
        process.stdin.flush()
        assert process.stdout.read(3)  # it speaks
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate("/report\n", timeout=120)
    assert process.returncode == 0, err
    assert "(stopped)" in err
    assert "tokens in 1 turns" in out
