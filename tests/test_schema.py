"""What is read from a file is of the type that is promised, or refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from keepkv import schema


@pytest.mark.parametrize(
    ("check", "rights", "wrongs"),
    [
        (schema.text, ["", "é"], [None, 1, b"x", "\ud800", ["x"]]),
        (schema.whole, [0, 2**53], [-1, True, 1.0, "1", None, 2**53 + 1, 10**400]),
        (schema.number, [0, -1.5], [True, float("nan"), float("inf"), 10**400, "1", None]),
        (schema.flag, [True, False], [0, 1, None, "true"]),
        (schema.sequence, [[], [1]], [(), {}, "x", None]),
        (schema.mapping, [{}, {"a": 1}], [[], {1: 2}, None]),
    ],
)
def test_values_are_what_they_should_be(check, rights, wrongs) -> None:
    assert [check(value) for value in rights] == rights
    for value in wrongs:
        with pytest.raises(ValueError, match=r".{9}"):
            check(value)


def test_only_an_object_of_json_is_parsed() -> None:
    assert schema.parse(b'{"a": [1]}') == {"a": [1]}
    for data in (b"[]", b"1", b"{", b'{"a": 1, "a": 2}', b"[" * 10**5, b"\xff", b'{"a": ' + b"9" * 5000 + b"}"):
        with pytest.raises(ValueError, match=r"."):
            schema.parse(data)


@dataclass(frozen=True)
class Whale:
    name: str
    tons: int = 1


def test_a_dataclass_is_made_of_checked_fields() -> None:
    assert schema.dataclass_of(Whale, {"name": "Moby", "tons": 50, "other": None}) == Whale("Moby", 50)
    for values, words in (
        ({"name": 1}, "name: 1 is not a text"),
        ({"tons": 2}, "missing"),
        ({"name": "x", "tons": True}, "tons"),
    ):
        with pytest.raises(ValueError, match=words):
            schema.dataclass_of(Whale, values)
