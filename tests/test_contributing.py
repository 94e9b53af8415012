"""CONTRIBUTING.md, word for word: its snippets are copied into a copy of the package, and work there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILE = re.compile(r"^(?:The file|Its test):\n\n```python\n(# (\S+)\n.*?)^```$", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^The line in `(\w+)` of `(\S+)`:\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL))
WITH_SNIPPETS = ("A method", "A task", "An attention backend")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and of what tests share, with everything added that the page says."""
    folder = tmp_path_factory.mktemp("contributed")
    shutil.copytree(ROOT / "src" / "keepkv", folder / "src" / "keepkv", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "tests/helpers.py", "tests/conftest.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for table, registry, line in LINE.findall(PAGE):
        source = (folder / registry).read_text(encoding="utf-8")
        head = f"{table} = (\n"
        assert source.count(head) == 1
        (folder / registry).write_text(source.replace(head, head + line), encoding="utf-8")
    for text, name in FILE.findall(PAGE):
        assert not (folder / name).exists()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("section", WITH_SNIPPETS)
def test_each_is_one_file_beside_its_test_and_one_line_of_a_registry(section: str) -> None:
    (_, file), (_, test) = FILE.findall(SECTIONS[section])
    assert file.startswith("src/keepkv/")
    assert test.startswith("tests/")
    ((_, registry, line),) = LINE.findall(SECTIONS[section])
    assert Path(registry).parent == Path(file).parent
    assert line.count("\n") == 1
    assert len(re.findall("^```[a-z]+$", SECTIONS[section], re.MULTILINE)) == 3


def test_what_was_added_passes_its_tests(copy: Path) -> None:
    done = run(copy, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    where = run(copy, sys.executable, "-c", "import keepkv; print(keepkv.__file__)").stdout
    assert Path(where.strip()).is_relative_to(copy)


@pytest.mark.parametrize(("name", "command"), [("value-norm", ("methods",)), ("password", ("eval", "--list"))])
def test_the_command_line_lists_it(copy: Path, name: str, command: tuple[str, ...]) -> None:
    done = run(copy, sys.executable, "-m", "keepkv", *command, "--json")
    assert name in [item["name"] for item in json.loads(done.stdout)], done.stderr


def test_what_was_added_is_in_good_style(copy: Path) -> None:
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed here")
    for command in (("format", "--check", "--diff"), ("check",)):
        done = run(
            copy, ruff, *command, *(name for _, name in FILE.findall(PAGE)), *{name for _, name, _ in LINE.findall(PAGE)}
        )
        assert done.returncode == 0, done.stdout + done.stderr
