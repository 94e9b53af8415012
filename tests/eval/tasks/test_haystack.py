"""The haystack: long real prose, never repeated."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from eval.drawn import PROSE, draw
from keepkv.errors import InputError
from keepkv.eval.sample import Draw, Prose, joined
from keepkv.eval.tasks import haystack, registry


def test_a_haystack_is_never_repeated() -> None:
    with pytest.raises(InputError, match="fewer than the"):
        registry.TASKS["needle"].make(draw(tokens=10**6))
    sample = registry.TASKS["needle"].make(draw(tokens=2500))
    prose = [sentence for sentence in PROSE.sentences if sentence in sample.text]
    assert len(prose) > 30
    assert all(sample.text.count(sentence) == PROSE.sentences.count(sentence) for sentence in prose)


def test_the_default_haystack_is_long_real_prose(tmp_path: Path) -> None:
    found = haystack.sentences()
    assert sum(map(len, found)) > 200_000
    assert len(set(found)) > 0.9 * len(found)
    for name, text in (
        ("b.txt", "Second text. " * 30),
        ("a.md", "The first text is here. " * 30),
        ("c.bin", "No text at all. " * 30),
    ):
        (tmp_path / name).write_text(text)
    folder = haystack.sentences(str(tmp_path))
    assert folder[0] == "The first text is here."
    assert not any("No text" in sentence for sentence in folder)


def test_samples_of_a_folder_come_from_different_files(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(" ".join(f"Sentence number {i} of the text {name}." for i in range(100)))
    prose = Prose(haystack.sentences(str(tmp_path)), lambda text: len(text.split()))
    assert prose.sentences.starts == (0, 100, 200, 300, 400, 500)
    texts = [registry.get("fidelity").make(Draw(random.Random(n), prose, 300, n)).text for n in range(6)]
    letters = [set(re.findall(r"the text (\w)\.", text)) for text in texts]
    assert sorted(map("".join, letters)) == list("abcdef"), "each within one file"
    long = registry.get("fidelity").make(Draw(random.Random(0), prose, 1000, 0)).text
    assert len(set(re.findall(r"the text (\w)\.", long))) == 2, "what is too short goes on with the next file"


def test_python_files_are_read_as_statements(tmp_path: Path) -> None:
    code = (
        "import os\n\n\nclass A:\n    @property\n    def size(self):\n        return 1\n\n    def other(self):\n        pass\n"
    )
    assert haystack.blocks(code) == [
        "import os\n\n",
        "@property\ndef size(self):\n    return 1\n\n",
        "def other(self):\n    pass\n\n",
    ]
    (tmp_path / "a.py").write_text(code * 4)
    assert len(haystack.sentences(str(tmp_path))) == 12
    assert joined(haystack.sentences(str(tmp_path))[:2]).startswith("import os\n\n@property\n")
    (tmp_path / "b.py").write_text("This file holds no Python. " * 9)
    assert haystack.sentences(str(tmp_path / "b.py"))[0] == "This file holds no Python."


def test_functions_of_the_library_are_many_and_begin_with_def() -> None:
    found = haystack.functions()
    assert sum(map(len, found)) > 400_000
    assert len(found.starts) > 50
    assert all(re.match(r"(async )?def ", block) and block.endswith("\n\n") for block in found)


def test_a_folder_of_make_texts_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts" / "speeches").mkdir(parents=True)
    (tmp_path / "texts" / "speeches" / "one.txt").write_text("The first speech is here. " * 30)
    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert haystack.sentences("speeches")[0] == "The first speech is here."
    with pytest.raises(InputError, match="cannot be read"):
        haystack.sentences("sermons")
