"""`keepkv inspect`: what it prints, the page and the picture that it writes."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import Page, run
from inspection.dissected import NASTY
from keepkv import render


def test_the_command_prints_and_writes(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    text, target = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text(NASTY * 12)
    args = ["inspect", str(text), "--model", folder, "--budget", "20%", "--html", str(target)]
    status, out, err = run(monkeypatch, capsys, *args)
    assert (status, err) == (0, "")
    joined = " ".join(out.split())
    assert "largest vote" in joined
    assert "Smaller: 5.0" in joined
    assert NASTY.strip() in Page(target.read_text()).words

    status, out, err = run(monkeypatch, capsys, *args[:-2], "--json", "--repeat", "always")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert (result["method"], result["repeated"]) == ("keepkv", True)
    assert "".join(token["text"] for token in result["tokens"]).count("<script>") == 12
    assert sum(len(head["positions"]) for head in result["heads"]) == sum(token["kept"] for token in result["tokens"])
    wanted = {"layer", "head", "slots", "error", "mass_error", "evict_error", "fallbacks", "max_vote", "mean_vote", "votes"}
    assert all(wanted <= head.keys() for head in result["heads"])
    assert all(len(head["votes"]) == head["slots"] for head in result["heads"])


def test_the_command_needs_no_matplotlib_but_for_a_picture(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    monkeypatch.setattr(render, "find_spec", lambda name: None)
    text = tmp_path / "text.txt"
    text.write_text(NASTY * 12)
    args = ["inspect", str(text), "--model", folder, "--png", str(tmp_path / "figure.png")]
    status, out, err = run(monkeypatch, capsys, *args)
    assert (status, out) == (2, "")
    assert "pip install 'keepkv[plot]'" in err
    assert "keepkv[plot]" in run(monkeypatch, capsys, "inspect", "--help")[1]
