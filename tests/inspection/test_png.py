"""The picture of a compression."""

from __future__ import annotations

from pathlib import Path

import pytest

from inspection.dissected import dissect
from keepkv import KeepKVError, render
from keepkv.inspection import png


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for method in ("keepkv", "snapkv"):
        png.save(dissect("gemma3", method)[1], tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(render, "find_spec", lambda name: None)
    with pytest.raises(KeepKVError, match=r"pip install 'keepkv\[plot\]'"):
        png.save(dissect()[1], tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())
