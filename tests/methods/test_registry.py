"""The table of methods: every one explains itself, and others are registered or found in a file."""

from __future__ import annotations

import json
from functools import partial

import pytest

from keepkv import MethodError, methods
from keepkv.methods import METHODS, get, registry


def test_unknown_methods_name_the_nearest() -> None:
    with pytest.raises(MethodError, match="did you mean 'snapkv'"):
        get("snapvk")


def test_every_row_of_the_table_explains_itself() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        assert method.paper or name in ("full", "random")


def test_a_row_is_registered_once_and_found_in_a_file(tmp_path, monkeypatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from keepkv import Method\nMINE = Method('mine', 'newest', 'nobody', lambda seen: seen.positions.float())\n"
    )
    monkeypatch.setattr(registry, "METHODS", dict(methods.METHODS))
    mine = methods.get(f"{file}:MINE")
    assert methods.get(f"{file}:MINE") is mine  # read once
    assert methods.register(mine) is methods.get("mine")
    with pytest.raises(MethodError, match="already"):
        methods.register(mine)
    for wrong in (f"{file}:YOURS", f"{tmp_path}/none.py:X", "no.such.module:X", f"{file}:Method"):
        with pytest.raises(MethodError):
            methods.get(wrong)


def test_every_row_says_what_it_costs_and_is_good_and_bad_at() -> None:
    for row in methods.METHODS.values():
        assert row.cost, row.name
        assert row.good, row.name
        assert row.bad, row.name
    assert json.dumps([row.name for row in methods.METHODS.values()])
    assert isinstance(methods.get("kvzip").allot, partial)
