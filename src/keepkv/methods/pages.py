"""Pages: one for every method, made of its row in the table and of the docstrings of its functions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from keepkv.methods.base import Method
from keepkv.paths import write_file

_PACKAGE = Path(__file__).parents[1]
AXES = ("references", "score", "allot", "choose", "merge")
_SECTION = re.compile(
    r"^(Args|Attributes|Returns|Raises|Example):$", re.MULTILINE
)  # from here on a docstring is for programmers
_DOCUMENT = re.compile(r"`docs/([\w/-]+\.md)( \d+(?:\.\d+)?)?`|(?<![\w/`])docs/([\w/-]+\.md)( \d+(?:\.\d+)?)?")


def page(method: Method) -> str:
    """The page of one method, Markdown: what it does, cost, memory, use, and step by step the equations and where they are."""
    lines = [f"# {method.name}", "", f"{method.summary[0].upper()}{method.summary[1:]}."]
    if method.paper:
        lines += ["", f"From: {_linked(method.paper)}."]
    lines += ["", f"* Good for: {method.good}.", f"* Bad at: {method.bad}.", f"* Cost: {method.cost}."]
    lines += [f"* Memory: {_memory(method)}.", f"* Always kept: {_protected(method)}."]
    for axis in AXES:
        function = getattr(method, axis)
        if function is None or method.keeps_all:
            continue
        name, place, text, options = _described(function)
        lines += _section(f"{axis.capitalize()}: `{name}`{options}", place, text)
        if axis == "allot" and method.same_tokens_in_all_heads:
            lines += ["", "All heads of a layer keep the same tokens. What they cannot share equally is not spent."]
    if method.layer_pairs is not None:
        lines += _section("Share: `LayerPairs`", "slots/layer_pairs.py", _text(method.layer_pairs))
    return "\n".join(lines) + "\n"


def index(methods: list[Method]) -> str:
    """The page that lists the others."""
    rows = [f"| [{m.name}]({m.name}.md) | {m.summary} | {_linked(m.paper) or '–'} |" for m in methods]
    head = [
        "# Methods",
        "",
        "Made by `keepkv methods --pages docs/methods` from the table of methods and their docstrings.",
        "",
    ]
    return "\n".join([*head, "| method | what is kept | paper |", "|---|---|---|", *rows]) + "\n"


def facts(method: Method) -> dict[str, Any]:
    """What the table says of a method, as plain values for JSON."""
    axes = {axis: _described(function)[0] for axis in AXES if (function := getattr(method, axis)) is not None}
    words = {name: getattr(method, name) for name in ("name", "summary", "paper", "cost", "good", "bad")}
    return {**words, "memory": _memory(method), **axes, "repeats": method.repeat is not None}


def write(methods: list[Method], folder: Path) -> int:
    """Writes all pages and the list into a folder. Returns how many files."""
    folder.mkdir(parents=True, exist_ok=True)
    for method in methods:
        write_file(folder / f"{method.name}.md", page(method))
    write_file(folder / "README.md", index(methods))
    return len(methods) + 1


def _section(title: str, place: str, text: str) -> list[str]:
    """One step of a method, with a link to its file."""
    return ["", f"## {title}", "", f"In [`{place}`](../../src/keepkv/{place})", "", text]


def _described(function: Callable[..., Any]) -> tuple[str, str, str, str]:
    """A function's name, file, text, and the options that the method gives it."""
    options = ""
    if isinstance(function, partial):
        options = " with " + ", ".join(f"{name} = {value:g}" for name, value in function.keywords.items())
        function = function.func
    inner = inspect.unwrap(function)
    place = Path(inspect.getsourcefile(inner) or "")
    place = place.relative_to(_PACKAGE) if place.is_relative_to(_PACKAGE) else Path(place.name)
    return inner.__name__, str(place), _text(inner), options


def _text(thing: object) -> str:
    """What a docstring says up to its arguments. Indented equations stand as they are."""
    return _linked(_SECTION.split(inspect.getdoc(thing) or "")[0].rstrip())


def _linked(text: str) -> str:
    """Text in which documents of this repository are links, as seen from docs/methods."""
    return _DOCUMENT.sub(lambda match: f"[{match[0]}](../{match[1] or match[3]})", text)


def _memory(method: Method) -> str:
    if method.keeps_all:
        return "that of all tokens"
    slots = "as many slots as the budget allows, each a key, a value, a vote and a position"
    extra = []
    if method.layer_pairs is not None:
        slots = "the bytes of the budget; slots of paired layers share their directions"
    if method.column_mass:
        extra.append("while reading, a number for every token and head")
    if method.references is not None:
        extra.append("while compressing, a layer's reference rows")
    if method.repeat is not None and method.repeat.queries:
        extra.append("the queries of the repetition")
    return "; ".join([slots, *extra])


def _protected(method: Method) -> str:
    if method.keeps_all:
        return "everything"
    newest = "the newest token" if method.recent == 1 else f"the newest {method.recent} tokens"
    newest = f"the newest tokens, {method.recent:.0%} of the slots" if method.recent < 1 else newest
    kept = [f"the first {method.sinks} tokens"] * bool(method.sinks) + [newest] * bool(method.recent)
    return " and ".join(kept) or "nothing"
