"""The page of a compression can be opened anywhere."""

from __future__ import annotations

from dataclasses import replace

from helpers import Page
from inspection.dissected import LENGTH, NASTY, dissect
from keepkv.inspection.html import page


def test_the_page_is_well_formed_and_asks_for_nothing(family: str) -> None:
    _, found = dissect(family)
    parsed = Page(page(found))
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(parsed.tags)
    assert {"src", "href", "srcset", "data", "action", "style"}.isdisjoint(name for name, _ in parsed.attributes)
    style = page(found).split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "".join(found.tokens) in parsed.words
    assert parsed.tags.count("rect") >= len(found.heads)
    assert sum(name == "title" and " of " in (value or "") for name, value in parsed.attributes) == LENGTH


def test_all_text_is_escaped() -> None:
    _, found = dissect(pieces=[NASTY] * LENGTH)
    written = page(replace(found, model=NASTY))
    assert "<script" not in written
    assert "&lt;script&gt;" in written
    assert Page(written).words.count("<script>alert('&amp;')</script>") == LENGTH + 1


def test_the_page_of_a_long_text_is_small() -> None:
    _, found = dissect()
    count = 10_000
    long = replace(
        found,
        tokens=tuple(f" token{i}" for i in range(count)),
        heads=tuple(replace(head, positions=tuple(range(count)), votes=(0.5,) * count) for head in found.heads * 300),
        report=replace(found.report, tokens=(count,)),
    )
    assert len(page(long).encode()) < 5_000_000
