"""The first screen: the README is short, its commands exist, its Python runs, and its picture is drawn from the records."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

from helpers import FOX, ROOT, run

README = (ROOT / "README.md").read_text("utf-8")
TEXT = FOX * 12


def test_the_readme_takes_two_minutes() -> None:
    assert len(README.splitlines()) <= 120
    assert max(map(len, README.splitlines())) <= 120
    assert len(README.split()) <= 900


def test_the_commands_of_the_readme_exist(monkeypatch, capsys) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    lines = re.findall(r"^keepkv (.*?)(?: +#|$)", README, re.MULTILINE)
    assert len(lines) >= 3
    for words in map(shlex.split, lines):
        helped = run(monkeypatch, capsys, words[0], "--help")[1]
        assert all(word in helped for word in words if word.startswith("--")), words


def test_the_python_of_the_readme_runs(folder: str, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("report.txt").write_text(TEXT)
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(block.replace("your/model", folder).replace("max_new_tokens=100", "max_new_tokens=2"), {})
    assert "keepkv" in capsys.readouterr().out


def test_every_target_of_the_readme_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)) <= targets


def test_the_picture_is_drawn_from_the_committed_records() -> None:
    drawn = runpy.run_path(str(ROOT / "benchmarks" / "draw_readme.py"))
    assert drawn["PICTURE"].read_text("utf-8") == drawn["picture"](), "make picture"
    assert str(drawn["PICTURE"].relative_to(ROOT)) in README


def test_the_notebook_shows_what_its_cells_gave() -> None:
    """What it gives today is CI's to say: make notebook."""
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    shown = {kind for output in outputs for kind in output.get("data", {})}
    assert {"text/html", "image/svg+xml"} <= shown
