"""Haystacks: real prose from a file or a folder, or, by default, from the documentation of installed packages."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from keepkv.errors import InputError
from keepkv.text.file import read_text

DOCUMENTED = ("numpy", "torch", "transformers")  # keepkv needs them, so that they are there
ENOUGH = 250_000  # letters taken of each
_TEST_FOLDERS = {"tests", "test", "testing"}
_SUFFIXES = {".txt", ".md", ".rst", ".text"}


@cache
def sentences(path: str = "") -> tuple[str, ...]:
    """The sentences of a haystack.

    Args:
        path: A text file, a folder (all its texts, in order of their names), or "": the documentation of installed packages.

    Raises:
        InputError: for what cannot be read, or holds fewer than 8 sentences.
    """
    if not path:
        text = "\n\n".join(documentation())
    elif Path(path).is_dir():
        files = sorted(file for file in Path(path).rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise InputError(f"the folder {path!r} holds no text: expected files ending in {', '.join(sorted(_SUFFIXES))}")
        text = "\n\n".join(read_text(str(file)) for file in files)
    else:
        text = read_text(path)
    flat = re.sub(r"\s+", " ", text)
    prose = tuple(part for part in re.split(r"(?<=[.!?]) ", flat) if 20 < len(part) < 600)
    if len(prose) < 8:
        raise InputError(f"{path!r} holds {len(prose)} sentences of prose: a haystack needs at least 8, better some thousand")
    return prose


def digest(path: str = "") -> str:
    """SHA-256 of the haystack's sentences, the first 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(sentences(path)).encode()).hexdigest()[:16]


def documentation() -> Iterator[str]:
    """Paragraphs of prose in the docstrings of installed packages, each once. Nothing is imported for it."""
    yielded: set[str] = set()
    for package in DOCUMENTED:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        letters = 0
        root = Path(spec.origin).parent
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root).parts
            if letters > ENOUGH or _TEST_FOLDERS & set(parts) or any(re.match("_[^_]", part) for part in parts):
                continue
            for paragraph in _paragraphs(file):
                if paragraph not in yielded:
                    yielded.add(paragraph)
                    letters += len(paragraph)
                    yield paragraph


def _paragraphs(file: Path) -> Iterator[str]:
    text = file.read_text(encoding="utf-8", errors="ignore")
    for block in re.findall(r'"""(.*?)"""', text, re.DOTALL):
        for paragraph in re.split(r"\n\s*\n", block):
            if _is_prose(paragraph.strip()):
                yield " ".join(paragraph.split())


def _is_prose(text: str) -> bool:
    """Whether a paragraph begins with a capital, ends with a full stop, is mostly lower case, and shows no code."""
    if len(text) < 120 or not text[0].isupper() or text[-1] != "." or re.search(r">>>|::|\\|[{}\[\]=<>]|_", text):
        return False
    lower_case = sum(letter.islower() or letter in " ,.\n" for letter in text)
    return lower_case > 0.9 * len(text) and not re.search(r"^\s*[-*.:]", text, re.MULTILINE)
