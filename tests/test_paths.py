"""Where the cache folder is."""

from __future__ import annotations

from pathlib import Path

from keepkv import paths


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KEEPKV_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.cache_folder() == tmp_path / "keepkv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert paths.cache_folder() == Path.home() / ".cache" / "keepkv"
