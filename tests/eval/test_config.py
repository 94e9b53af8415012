"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from keepkv.errors import InputError
from keepkv.eval.config import Config, changed, continues, load_config, load_run, to_toml


def test_settings_are_toml_and_come_back(tmp_path: Path) -> None:
    config = replace(Config(), tasks=("needle",), haystack='odd "name"\t\\é', question_aware=True)
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "config.toml") == config
    with pytest.raises(InputError, match="did you mean 'samples'"):
        changed(config, {"sample": 3})
    with pytest.raises(InputError, match="expected a list of whole numbers"):
        changed(config, {"lengths": ["many"]})


@pytest.mark.parametrize(("old", "new"), [("auto", "auto"), ("context", "never"), ("recall", "always")])
def test_the_settings_of_a_run_of_an_older_keepkv_say_what_to_write_instead(tmp_path: Path, old: str, new: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(to_toml(Config()).replace('repeat = "auto"\nslot_dtypes = ["auto"]', f'reference = "{old}"'))
    with pytest.raises(InputError, match=f"'reference' .* is called 'repeat' now: write repeat = \"{new}\" instead") as error:
        load_config(file)
    assert str(error.value).startswith(str(file))
    file.write_text(file.read_text().replace(f'reference = "{old}"', f'repeat = "{new}"'))
    assert load_config(file) == replace(Config(), repeat=new), "slot_dtypes is new, and has a default"
    assert load_run(tmp_path).slot_dtypes == ("float",), "but what was recorded then was stored as floats"
    file.write_text('slot_dtypes = ["int4"]')
    assert load_run(tmp_path).slot_dtypes == ("int4",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeat": "recall"}, "expected one of auto, always, never"),
        ({"slot_dtypes": ("float", "int9")}, "did you mean 'int8'"),
        ({"lengths": (12,)}, "each of at least 64 tokens"),
        ({"full_dtype": "int9"}, "full_dtype"),
        ({"samples": 0}, "expected at least 1"),
        ({"methods": ()}, "at least one task"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_starts(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(Config(), **changes).validate()


def test_settings_that_had_one_value_are_lists_now(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('model = "gemma"\nslot_dtype = "int8"\n')
    assert load_config(file) == replace(Config(), models=("gemma",), slot_dtypes=("int8",))
    with pytest.raises(InputError, match="unknown setting 'model': did you mean 'models'"):
        changed(Config(), {"model": 3})
    before, now = Config(models=("a",)), Config(models=("a", "b"), slot_dtypes=("float", "int4"))
    continues(before, now, "run")
    with pytest.raises(InputError, match="has seed = 0, not 1"):
        continues(before, replace(now, seed=1), "run")
