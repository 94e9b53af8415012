"""Haystacks: real prose from a file or a folder, or, by default, from the documentation of installed packages."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import re
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import accumulate, chain
from pathlib import Path

from keepkv.errors import InputError
from keepkv.paths import texts_folder
from keepkv.text.file import read_text

DOCUMENTED = ("numpy", "torch", "transformers")  # keepkv needs them, so that they are there
ENOUGH = 250_000  # letters taken of each
MODULES = (  # of the standard library, pure Python, in every supported version
    "argparse", "ast", "bdb", "calendar", "cmd", "code", "codecs", "configparser", "copy", "csv", "dataclasses", "difflib",
    "dis", "doctest", "filecmp", "fileinput", "fractions", "ftplib", "gettext", "gzip", "heapq", "imaplib", "inspect",
    "ipaddress", "locale", "mailbox", "mimetypes", "netrc", "optparse", "pdb", "pickle", "pickletools", "plistlib", "poplib",
    "pprint", "profile", "pstats", "pyclbr", "pydoc", "queue", "quopri", "random", "sched", "selectors", "shelve", "shlex",
    "shutil", "smtplib", "socketserver", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading",
    "timeit", "tokenize", "trace", "traceback", "turtle", "types", "uuid", "warnings", "wave", "weakref", "webbrowser",
)  # fmt: skip
LONGEST = 800  # letters of a statement
_TEST_FOLDERS = {"tests", "test", "testing"}
_SUFFIXES = {".txt", ".md", ".rst", ".text", ".py"}


class Haystack(tuple[str, ...]):
    """Sentences of several texts, one text after the other.

    Attributes:
        starts: Where each text starts.
    """

    starts: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]]) -> Haystack:
        """The sentences of these texts."""
        haystack = cls(chain.from_iterable(texts))
        haystack.starts = tuple(accumulate(map(len, texts[:-1]), initial=0))
        return haystack


@cache
def sentences(path: str = "") -> Haystack:
    """The sentences of a haystack, and the statements of Python files.

    Args:
        path: A text file, a folder (all its texts, in order of their names), or "": the documentation of installed packages.
            A name that is no file here, such as "sotu", is a folder that `make texts` has filled.

    Raises:
        InputError: for what cannot be read, or holds fewer than 8 sentences.
    """
    if path and not Path(path).exists() and (texts_folder() / path).is_dir():
        path = str(texts_folder() / path)
    if not path:
        texts = [_sentences("\n\n".join(documentation()))]
    elif Path(path).is_dir():
        files = sorted(file for file in Path(path).rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise InputError(f"the folder {path!r} holds no text: expected files ending in {', '.join(sorted(_SUFFIXES))}")
        texts = [parts for file in files if (parts := _parts(file))]
    else:
        texts = [_parts(Path(path))]
    found = Haystack.of(texts)
    if len(found) < 8:
        raise InputError(f"{path!r} holds {len(found)} sentences of prose: a haystack needs at least 8, better some thousand")
    return found


def _parts(file: Path) -> list[str]:
    """The sentences of a file, or its statements if it is Python."""
    text = read_text(str(file))
    if file.suffix == ".py":
        with contextlib.suppress(SyntaxError):
            return blocks(text)
    return _sentences(text)


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?]) ", re.sub(r"\s+", " ", text)) if 20 < len(part) < 600]


def digest(path: str = "") -> str:
    """SHA-256 of the haystack's sentences, the first 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(sentences(path)).encode()).hexdigest()[:16]


@cache
def functions() -> Haystack:
    """The functions of Python's standard library, a text for each module. Nothing is imported for it."""
    files = (Path(sysconfig.get_path("stdlib")) / f"{module}.py" for module in MODULES)
    texts = [blocks(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    return Haystack.of([[block for block in text if block.startswith(("def ", "async def "))] for text in texts])


def blocks(source: str) -> list[str]:
    """The statements of a Python file, and of its classes, in order, without long ones: each with two line breaks after it."""
    lines = source.splitlines()
    found = []
    for node in ast.parse(source).body:
        parts = node.body if isinstance(node, ast.ClassDef) else [node]
        for part in parts:
            first = min([part.lineno, *(decorator.lineno for decorator in getattr(part, "decorator_list", ()))])
            found.append(textwrap.dedent("\n".join(lines[first - 1 : part.end_lineno])) + "\n\n")
    return [block for block in found if len(block) < LONGEST]


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
