"""Manual: a page for every method, made of its row and of what its functions say of themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from keepkv.methods.base import Method

_PACKAGE = Path(__file__).parents[1]
AXES = ("references", "score", "allot", "choose", "merge")


def page(method: Method) -> str:
    """The page of one method, Markdown: what it does, cost, memory, use, and axis by axis the equations and where they are."""
    lines = [f"# {method.name}", "", f"{method.summary[0].upper()}{method.summary[1:]}."]
    if method.paper:
        lines += ["", f"From: {method.paper}."]
    lines += ["", f"* Good for: {method.good}.", f"* Bad at: {method.bad}.", f"* Cost: {method.cost}."]
    lines += [f"* Memory: {_memory(method)}.", f"* Always kept: {_protected(method)}."]
    for axis in AXES:
        function = getattr(method, axis)
        if function is None or method.keeps_all:
            continue
        name, place, text, options = _told(function)
        lines += ["", f"## {axis.capitalize()}: `{name}`{options}", "", f"In [`{place}`](../../src/keepkv/{place})", "", text]
    if method.layer_pairs is not None:
        lines += [
            "",
            "## Share: `LayerPairs`",
            "",
            "In [`slots/layer_pairs.py`](../../src/keepkv/slots/layer_pairs.py)",
            "",
            _text(method.layer_pairs),
        ]
    return "\n".join(lines) + "\n"


def index(methods: list[Method]) -> str:
    """The page that lists the others."""
    rows = [f"| [{m.name}]({m.name}.md) | {m.summary} | {m.paper or '–'} |" for m in methods]
    head = ["# Methods", "", "Made by `keepkv methods --pages docs/methods` from the table and the code.", ""]
    return "\n".join([*head, "| method | what is kept | paper |", "|---|---|---|", *rows]) + "\n"


def facts(method: Method) -> dict[str, Any]:
    """The row as plain values, for JSON."""
    axes = {axis: _told(function)[0] for axis in AXES if (function := getattr(method, axis)) is not None}
    words = {name: getattr(method, name) for name in ("name", "summary", "paper", "cost", "good", "bad")}
    return {**words, "memory": _memory(method), **axes, "repeats": method.repeat is not None}


def write(methods: list[Method], folder: Path) -> int:
    """Writes all pages and the list into a folder; how many files."""
    folder.mkdir(parents=True, exist_ok=True)
    for method in methods:
        (folder / f"{method.name}.md").write_text(page(method), encoding="utf-8")
    (folder / "README.md").write_text(index(methods), encoding="utf-8")
    return len(methods) + 1


def _told(function: Callable[..., Any]) -> tuple[str, str, str, str]:
    """A function's name, file, text, and how the row calls it."""
    options = ""
    if isinstance(function, partial):
        options = " with " + ", ".join(f"{name} = {value:g}" for name, value in function.keywords.items())
        function = function.func
    inner = inspect.unwrap(function)
    place = Path(inspect.getsourcefile(inner) or "")
    place = place.relative_to(_PACKAGE) if place.is_relative_to(_PACKAGE) else Path(place.name)
    return inner.__name__, str(place), _text(inner), options


def _text(thing: object) -> str:
    """What it says of itself, its indented equations as they stand."""
    return inspect.getdoc(thing) or ""


def _memory(method: Method) -> str:
    if method.keeps_all:
        return "that of all tokens"
    slots = "as many slots as the budget allows, each a key, a value, a vote and a position"
    extra = []
    if method.layer_pairs is not None:
        slots = "the bytes of the budget; slots of paired layers share their directions"
    if method.column_mass:
        extra.append("while reading, a number per token and head")
    if method.references is not None:
        extra.append("while compressing, a layer's reference rows")
    if method.repeat is not None and method.repeat.queries:
        extra.append("the repetition's queries")
    return "; ".join([slots, *extra])


def _protected(method: Method) -> str:
    if method.keeps_all:
        return "everything"
    newest = "the newest token" if method.recent == 1 else f"the newest {method.recent} tokens"
    newest = f"the newest tokens, {method.recent:.0%} of the slots" if method.recent < 1 else newest
    kept = [f"the first {method.sinks} tokens"] * bool(method.sinks) + [newest] * bool(method.recent)
    return " and ".join(kept) or "nothing"
