"""keepkv eval and report: one clear line for every mistake."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path

import pytest

from helpers import run
from keepkv.cli.eval import evaluate
from keepkv.eval.config import Config

MISTAKES = [
    (["eval"], "the folder of the run is missing"),
    (["eval", "{there}", "--tasks", "needel"], "did you mean 'needle'"),
    (["eval", "{there}", "--methods", "snapkw"], "did you mean 'snapkv'"),
    (["eval", "{there}", "--budgets", "lots"], "cannot be read: expected a share"),
    (["eval", "{there}", "--lengths", "many"], "expected whole numbers"),
    (["eval", "{there}", "--by", "chance"], "expected one of choice, answer"),
    (["eval", "{there}", "--data", "nowhere.json"], "cannot be read (No such file"),
    (["eval", "{there}", "--data", "hf:owner/name"], "needs the package datasets"),
    (["eval", "{there}", "--data", "{odd}"], "expected the fields of one of squad"),
    (["eval", "{there}", "--haystack", "nowhere"], "cannot be read (No such file"),
    (["eval", "{there}", "--config", "{odd}"], "is not TOML"),
    (["eval", "{there}", "--config", "{old}"], 'write repeat = "always" instead of that line'),
    (["eval", "{there}", "--slot-dtype", "int9"], "did you mean 'int8'"),
    (["report", "{there}"], "is not the folder of a run"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_mistakes_get_one_clear_line(monkeypatch, capsys, tmp_path: Path, args: list[str], message: str) -> None:
    (tmp_path / "odd.json").write_text('{"colour": "red"}\n')
    (tmp_path / "old.toml").write_text('reference = "recall"\n')
    places = {name: tmp_path / file for name, file in {"there": "there", "odd": "odd.json", "old": "old.toml"}.items()}
    args = [arg.format(**places) for arg in args]
    status, out, said = run(monkeypatch, capsys, *args)
    assert (status, out) == (2, "")
    assert message in " ".join(said.split())
    assert said.count("\n") == 1
    assert not (tmp_path / "there").exists()


def test_the_defaults_that_the_help_names_are_those_of_the_settings() -> None:
    named = {}
    for name, parameter in inspect.signature(evaluate, eval_str=True).parameters.items():
        default = re.search(r"\[default: ([\w.,%-]+)\]", typing.get_args(parameter.annotation)[1].help or "")
        if default:
            named[name] = default[1]
    for name, default in named.items():
        value = getattr(Config(), name)
        assert default == (",".join(map(str, value)) if isinstance(value, tuple) else str(value)), name
    assert {"tasks", "methods", "budgets", "lengths", "samples", "by", "repeat", "slot_dtypes", "models"} <= named.keys()
