"""The haystack: long real prose, never repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.drawn import PROSE, draw
from keepkv.errors import InputError
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
