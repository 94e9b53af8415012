"""Schema: what is read from a file is checked, value by value, before anything is made of it.

Every function returns its value, of the type it promises, or raises ValueError. JSON has surprises that are refused here:
`true` is no number, `1e400`, `NaN` and `Infinity` are none either, and half of a surrogate pair is no text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")
LARGEST = 2**53  # the largest whole number that everybody who reads JSON agrees on


def parse(data: str | bytes) -> dict[str, Any]:
    """The object that a JSON text holds.

    Raises:
        ValueError: for anything else, and for JSON that is too deep or names a key twice.

    Example:
        >>> parse(b'{"a": 1}')
        {'a': 1}
    """
    try:
        value = json.loads(data, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    return value


def text(value: object) -> str:
    """A text that can be written as UTF-8.

    Example:
        >>> text("whale")
        'whale'
    """
    if not isinstance(value, str):
        raise ValueError(f"{_shown(value)} is not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{_shown(value)} holds half of a surrogate pair") from None
    return value


def flag(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{_shown(value)} is not true or false")
    return value


def whole(value: object, least: int = 0, most: int = LARGEST) -> int:
    """A whole number within bounds.

    Example:
        >>> whole(3)
        3
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{_shown(value)} is not a whole number from {least:,} to {most:,}")
    return value


def number(value: object, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number within bounds; whole numbers are numbers, too."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e300 or not least <= value <= most:
        raise ValueError(f"{_shown(value)} is not a number from {least:g} to {most:g}")
    return float(value)


def sequence(value: object, length: int | None = None) -> list[Any]:
    """A list, of a length if one is given."""
    if not isinstance(value, list) or length not in (None, len(value)):
        raise ValueError(f"{_shown(value)} is not a list" + ("" if length is None else f" of {length}"))
    return value


def mapping(value: object) -> dict[str, Any]:
    """An object, whose keys are texts."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{_shown(value)} is not an object")
    return value


def measured(value: object) -> float:
    """What was measured and computed: a number, or NaN or an infinity."""
    return value if isinstance(value, float) else number(value)


_KINDS: dict[str, Callable[[Any], Any]] = {
    "str": text,
    "bool": flag,
    "int": lambda value: whole(value, -LARGEST),
    "float": measured,
    "float | None": lambda value: None if value is None else measured(value),
    "tuple[float, ...]": lambda value: tuple(map(measured, sequence(value))),
    "tuple[str, ...]": lambda value: tuple(map(text, sequence(value))),
    "dict[str, float]": lambda value: {text(key): measured(each) for key, each in mapping(value).items()},
    "dict[str, str]": lambda value: {text(key): text(each) for key, each in mapping(value).items()},
}


def dataclass_of(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass whose fields are plain values, of an object with those names; names that it does not have are passed over.

    Raises:
        ValueError: for a value of another type than the field's, and for a field without default that is missing.
    """
    checked = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            try:
                checked[field.name] = _KINDS[str(field.type)](values[field.name])
            except ValueError as error:
                raise ValueError(f"{field.name}: {error}") from None
    try:
        return kind(**checked)
    except TypeError as error:
        raise ValueError(str(error).rpartition("() ")[2]) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is there twice")
    return values


def _shown(value: object) -> str:
    """The beginning of a value, in an error."""
    shown = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else f"a number of {value.bit_length()} bits"
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
