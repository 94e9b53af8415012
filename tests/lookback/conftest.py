"""A cache folder of its own for every test: what is found out about a model is remembered there."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path))
    return tmp_path
