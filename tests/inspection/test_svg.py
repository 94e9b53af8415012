"""The page's figures."""

from __future__ import annotations

from dataclasses import replace

from helpers import Page
from inspection.dissected import dissect
from keepkv.inspection import svg


def test_figures_hold_at_their_edges() -> None:
    _, found = dissect()
    none, same = (tuple(replace(head, result=replace(head.result, **change)) for head in found.heads) for change in (
        {"error": 0.0, "evict_error": 0.0, "slots": 0}, {"error": 1.0, "evict_error": 1.0, "fallbacks": 1, "slots": 7},
    ))  # fmt: skip
    for heads in (none, same, tuple(replace(head, positions=(), votes=()) for head in found.heads), found.heads[:1]):
        for draw in (svg.budgets, svg.errors, svg.votes):
            drawn = draw(replace(found, heads=heads))
            Page(drawn)
            assert "nan" not in drawn
            assert "inf" not in drawn
