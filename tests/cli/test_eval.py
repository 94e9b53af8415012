"""keepkv eval and report: one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import run

MISTAKES = [
    (["eval"], "the folder of the run is missing"),
    (["eval", "{there}", "--tasks", "needel"], "did you mean 'needle'"),
    (["eval", "{there}", "--methods", "snapkw"], "did you mean 'snapkv'"),
    (["eval", "{there}", "--budgets", "lots"], "cannot be read: expected a fraction"),
    (["eval", "{there}", "--lengths", "many"], "expected whole numbers"),
    (["eval", "{there}", "--by", "chance"], "expected one of choice, answer"),
    (["eval", "{there}", "--data", "nowhere.json"], "cannot be read (No such file"),
    (["eval", "{there}", "--data", "hf:owner/name"], "needs the package datasets"),
    (["eval", "{there}", "--data", "{odd}"], "expected the fields of one of squad"),
    (["eval", "{there}", "--haystack", "nowhere"], "cannot be read (No such file"),
    (["eval", "{there}", "--config", "{odd}"], "is not TOML"),
    (["report", "{there}"], "is not the folder of a run"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_mistakes_get_one_clear_line(monkeypatch, capsys, tmp_path: Path, args: list[str], message: str) -> None:
    (tmp_path / "odd.json").write_text('{"colour": "red"}\n')
    args = [arg.format(there=tmp_path / "there", odd=tmp_path / "odd.json") for arg in args]
    status, out, said = run(monkeypatch, capsys, *args)
    assert (status, out) == (2, "")
    assert message in " ".join(said.split())
    assert said.count("\n") == 1
    assert not (tmp_path / "there").exists()
