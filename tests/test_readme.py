"""The README: its commands exist and its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from helpers import FOX, ROOT, run

TEXT = FOX * 12
README = (ROOT / "README.md").read_text()


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
    assert "method          keepkv\nbudget          0.1\n" in capsys.readouterr().out


def test_every_target_of_the_readme_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)) <= targets
