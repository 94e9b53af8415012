"""The pages of the methods."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import ROOT, run
from keepkv.methods import METHODS


def test_methods_have_pages_and_the_committed_ones_are_up_to_date(monkeypatch, capsys, tmp_path: Path) -> None:
    status, shown, _ = run(monkeypatch, capsys, "methods", "snapkv", "keepkv")
    assert status == 0
    assert "moving mean over 5 neighbors" in shown  # the equation, as the code has it
    assert "score.py" in shown
    run(monkeypatch, capsys, "methods", "--pages", str(tmp_path))
    committed = ROOT / "docs" / "methods"
    made = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    assert set(made) == {f"{name}.md" for name in [*METHODS, "README"]}
    assert made == {path.name: path.read_text("utf-8") for path in committed.iterdir()}, "keepkv methods --pages docs/methods"
    facts = {row["name"]: row for row in json.loads(run(monkeypatch, capsys, "methods", "--json")[1])}
    assert facts["criticalkv"]["choose"] == "two_stages"
    assert facts["kvzip"]["repeats"]
    assert all(row["cost"] and row["good"] and row["bad"] and row["memory"] for row in facts.values())
