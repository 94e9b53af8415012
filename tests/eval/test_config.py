"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from keepkv.errors import InputError
from keepkv.eval.config import Config, changed, load_config, to_toml


def test_settings_are_toml_and_come_back(tmp_path: Path) -> None:
    config = replace(Config(), tasks=("needle",), haystack='odd "name"\t\\é', question_aware=True)
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "config.toml") == config
    with pytest.raises(InputError, match="did you mean 'samples'"):
        changed(config, {"sample": 3})
    with pytest.raises(InputError, match="expected a list of whole numbers"):
        changed(config, {"lengths": ["many"]})
