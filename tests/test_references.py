"""What refers resolves: links, anchors, paths, module names and citations, and nothing names a place outside the repository."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from helpers import ROOT

LISTED = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
).stdout.split("\0")
FILES = [name for name in LISTED if name and (ROOT / name).is_file()]
FOLDERS = {str(parent) for name in FILES for parent in Path(name).parents}
MARKDOWN = [name for name in FILES if name.endswith(".md")]
WRITTEN = [name for name in MARKDOWN if not name.startswith("benchmarks/results/")]  # not those that `keepkv report` has made
PYTHON = [name for name in FILES if name.endswith(".py")]
NOW = [name for name in (*MARKDOWN, *PYTHON) if name != "CHANGELOG.md"]  # which names what has changed
FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(
    r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^()\s>]+)>?(?:\s+\"[^\"]*\")?\)"  # [text](target)
    r"|(?:href|src|srcset)=\"([^\"]+)\""
    r"|^\[[^\]]+\]: (\S+)$",  # [name]: target
    re.MULTILINE,
)
PATH = re.compile(r"(?<![\w./-])(?:src/keepkv|docs|benchmarks|examples|tests|tests_vllm|tests_site)/[\w./*…-]*[\w/]")
MODULE = re.compile(r"(?<![\w./-])keepkv(?:\.[A-Za-z_]\w*)+(?![\w/-])")
THEORY = re.compile(r"theory\.md`?\)?,? (?:sections? |chapters? )?((?:\d+(?:\.\d+)?(?:, | and | to |–|, and )?)+)")


def read(name: str) -> str:
    try:
        return (ROOT / name).read_text("utf-8")
    except UnicodeDecodeError:
        return ""


@cache
def prose(name: str) -> str:
    """A Markdown file without its code blocks, or all docstrings of a Python file."""
    if name.endswith(".md"):
        return FENCE.sub("", read(name))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(read(name))) if isinstance(node, kinds))
    return "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes)))


@cache
def anchors(name: str) -> set[str]:
    """The anchors of a Markdown file, as GitHub makes them of its headings, and those it names itself."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose(name), re.MULTILINE):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("**", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = sum(1 for other in found if other == slug or re.fullmatch(re.escape(slug) + r"-\d+", other))
        found.add(f"{slug}-{count}" if count else slug)
    return found | set(re.findall(r"(?:id|name)=\"([^\"]+)\"", prose(name)))


def broken_links(name: str) -> Iterator[str]:
    for target in map("".join, LINK.findall(prose(name))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name  # noqa: PTH118, PTH120
        if place not in FILES and place not in FOLDERS:
            yield f"{target} (no such file)"
        elif anchor and place.startswith("docs/reference/"):
            if not resolves(anchor):
                yield f"{target} (no such name)"
        elif anchor and place.endswith(".md") and anchor not in anchors(place):
            yield f"{target} (no such heading)"


@cache
def gone() -> set[str]:
    """Paths that the notes say are no longer in the repository."""
    section = read("docs/notes/README.md").partition("## What is no longer in the repository")[2]
    return {path for path in PATH.findall(section) if path not in FILES}


def broken_paths(text: str) -> Iterator[str]:
    for path in PATH.findall(text):
        path = path.rstrip("/")
        if "*" in path or "…" in path or "..." in path:
            continue
        if path not in FILES and path not in FOLDERS and path not in gone():
            yield path


@cache
def resolves(dotted: str) -> bool:
    """Whether a name of keepkv is a module, or something in one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        place = "/".join(["src", *parts[:count]])
        if f"{place}.py" in FILES or f"{place}/__init__.py" in FILES:
            break
    rest = parts[count:]
    if not rest:
        return True
    try:
        thing: object = importlib.import_module(".".join(parts[:count]))
    except ImportError:  # it needs an extra that is not here: the name must at least stand in the file
        return bool(re.search(rf"\b{re.escape(rest[0])}\b", read(f"{place}.py")))
    for part in rest:
        fields = getattr(thing, "__annotations__", {})
        if not hasattr(thing, part) and part not in fields:
            return False
        thing = getattr(thing, part, None)
    return True


@cache
def sections() -> set[str]:
    """The numbers of the chapters and sections of the theory, and of the items of a chapter that is a numbered list."""
    chapters = re.split(r"^## (\d+) ", read("docs/theory.md"), flags=re.MULTILINE)[1:]
    found = set(chapters[::2])
    for number, text in zip(chapters[::2], chapters[1::2], strict=True):
        found |= {f"{number}.{item}" for item in re.findall(r"^(\d+)\. ", text, re.MULTILINE)}
        found |= set(re.findall(r"^### (\d+\.\d+) ", text, re.MULTILINE))
    return found


def missing_sections(text: str) -> Iterator[str]:
    for cited in THEORY.findall(" ".join(text.split())):
        yield from (number for number in re.findall(r"\d+(?:\.\d+)?", cited) if number not in sections())


@pytest.mark.parametrize("name", WRITTEN)
def test_links_and_anchors_of_markdown_resolve(name: str) -> None:
    assert list(broken_links(name)) == []


@pytest.mark.parametrize("name", NOW)
def test_paths_of_this_repository_exist(name: str) -> None:
    text = prose(name) if name.endswith(".py") else "\n".join(re.findall(r"`+[^`]+`+", prose(name)))
    assert sorted(set(broken_paths(text))) == []


@pytest.mark.parametrize("name", NOW)
def test_names_of_keepkv_exist(name: str) -> None:
    text = "\n".join(re.findall(r"`+[^`]+`+", prose(name)))
    assert sorted({dotted for dotted in MODULE.findall(text) if not resolves(dotted)}) == []


@pytest.mark.parametrize("name", [*MARKDOWN, *PYTHON])
def test_cited_sections_of_the_theory_exist(name: str) -> None:
    assert list(missing_sections(prose(name))) == []


NAMES = (
    "pypi.* pythonhosted.* npmjs.* npmjs.+ debian.* anaconda.* anaconda.+ rubygems.* golang.* download.pytorch.* "
    "archive.ubuntu.+"
)
HOSTS = [name.replace(".*", ".org").replace(".+", ".com") for name in NAMES.split()]  # so that this file names none
FORBIDDEN = {
    "a package registry's host": re.compile("|".join(map(re.escape, HOSTS))),
    "an absolute path of a machine": re.compile(r"(?<![\w.:/-])/(?:home|Users|root|work|tmp|mnt|opt|srv)/\w"),
    "a folder beside the repository": re.compile(r"\.\./" + "shared"),
    "a document that is not here": re.compile("SYS" + r"TEMS\b|DESIGN(?:\.md)? " + r"section \d|docs/" + r"log\.md"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what: str) -> None:
    found = [f"{name}: {match[0]}" for name in FILES for match in FORBIDDEN[what].finditer(read(name))]
    assert found == []


def test_what_is_wrong_is_found() -> None:
    assert list(broken_paths("`src/keepkv/nowhere.py` and `src/keepkv/score.py`, `tests/test_*.py`")) == [
        "src/keepkv/nowhere.py"
    ]
    assert list(missing_sections("see docs/theory.md 1.1, 99.1 and 2.5")) == ["99.1"]
    assert not resolves("keepkv.nowhere")
    assert not resolves("keepkv.score.nothing")
    assert resolves("keepkv.score.output_change")
    assert "14-composing-merges" in anchors("docs/theory.md")
