"""inspect: what it says about a compression is what the cache holds, and its page can be opened anywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import AutoTokenizer

from conftest import make_model, run, tokens
from keepkv import InputError, KeepCache, KeepKVError, render
from keepkv.inspection import anatomy, png, svg
from keepkv.inspection.anatomy import Anatomy
from keepkv.inspection.html import page

LENGTH = 200
NASTY = "<script>alert('&amp;')</script> \"quoted\" http://example.org/x "
VOID = {"meta", "br", "img", "link", "input", "hr"}


def dissect(family: str = "llama", method: str = "keepkv", pieces: list[str] | None = None) -> tuple[KeepCache, Anatomy]:
    cache = KeepCache(make_model(family, torch.float32), 0.2, method)
    make_model(family, torch.float32)(tokens(1, LENGTH), past_key_values=cache)
    return cache, anatomy.of(cache, pieces or [NASTY[i % len(NASTY)] for i in range(LENGTH)], "tiny")


class Page(HTMLParser):
    """Checks that tags are closed in order; collects attributes and the words between the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


# --- the numbers ---


def test_the_heads_are_those_of_the_cache(family: str) -> None:
    cache, found = dissect(family)
    report = cache.report()
    full = [i for i, layer in enumerate(cache.layers) if layer in cache.keep_layers]
    assert [layer[0].layer for layer in found.layers] == full
    assert sum(head.made.slots for head in found.heads) == int(0.2 * LENGTH * len(found.heads))
    assert report.kept == (tuple(tuple(head.made.slots for head in layer) for layer in found.layers),)
    assert report.slots == pytest.approx(sum(found.keepers) / len(found.heads))
    for head in found.heads:
        assert len(head.positions) == len(head.votes) == head.made.slots
        assert list(head.positions) == sorted(set(head.positions))
        assert max(head.votes, default=0) == pytest.approx(head.made.max_vote)
        assert 0 <= head.made.error <= head.made.evict_error
    assert sum(found.votes) == pytest.approx(sum(vote for head in found.heads for vote in head.votes))
    assert all(bool(votes) <= bool(kept) for votes, kept in zip(found.votes, found.keepers, strict=True))
    assert report.error == fmean(head.made.error for head in found.heads)
    assert report.max_vote == max(head.made.max_vote for head in found.heads)


def test_a_method_that_holds_nothing_out_has_no_errors_to_show() -> None:
    _, found = dissect(method="snapkv")
    assert not found.judged
    assert found.to_dict()["error"] is None
    assert {head["error"] for head in found.to_dict()["heads"]} == {None}
    assert set(found.votes) <= set(range(len(found.heads) + 1))
    assert "has no errors to show" in page(found)


def test_nothing_compressed_is_nothing_to_inspect() -> None:
    cache = KeepCache(make_model(), 1.0)
    make_model()(tokens(1, 50), past_key_values=cache)
    assert cache.report().heads == ()
    with pytest.raises(InputError, match="nothing to inspect"):
        anatomy.of(cache, ["x"] * 50)


def test_pieces_join_to_the_text(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "naïve 日本 🙂 <b>\n\n end"
    ids = tokenizer(text)["input_ids"]
    parts = anatomy.pieces(tokenizer, ids)
    assert len(parts) == len(ids)
    assert "".join(parts) == text
    assert "🙂" in parts
    cut = anatomy.pieces(tokenizer, tokenizer("🙂")["input_ids"][:2])
    assert len(cut) == 2


# --- the page ---


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


def test_figures_hold_at_their_edges() -> None:
    _, found = dissect()
    none, same = (tuple(replace(head, made=replace(head.made, **change)) for head in found.heads) for change in (
        {"error": 0.0, "evict_error": 0.0, "slots": 0}, {"error": 1.0, "evict_error": 1.0, "fallbacks": 1, "slots": 7},
    ))  # fmt: skip
    for heads in (none, same, tuple(replace(head, positions=(), votes=()) for head in found.heads), found.heads[:1]):
        for draw in (svg.budgets, svg.errors, svg.votes):
            drawn = draw(replace(found, heads=heads))
            Page(drawn)
            assert "nan" not in drawn
            assert "inf" not in drawn


# --- the picture ---


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for method in ("keepkv", "snapkv"):
        png.save(dissect("gemma3", method)[1], tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(render, "find_spec", lambda name: None)
    with pytest.raises(KeepKVError, match=r"pip install 'keepkv\[plot\]'"):
        png.save(dissect()[1], tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


# --- the command ---


def test_the_command_prints_and_writes(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    text, target = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text(NASTY * 12)
    args = ["inspect", str(text), "--model", folder, "--budget", "20%", "--html", str(target)]
    status, out, err = run(monkeypatch, capsys, *args)
    assert (status, err) == (0, "")
    joined = " ".join(out.split())
    assert "largest vote" in joined
    assert "Smaller: 4." in joined
    assert NASTY.strip() in Page(target.read_text()).words

    status, out, err = run(monkeypatch, capsys, *args[:-2], "--json", "--repeat", "always")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert (result["method"], result["repeated"]) == ("keepkv", True)
    assert "".join(token["text"] for token in result["tokens"]).count("<script>") == 12
    assert sum(len(head["positions"]) for head in result["heads"]) == sum(token["kept"] for token in result["tokens"])
    wanted = {"layer", "head", "slots", "error", "mass_error", "evict_error", "fallbacks", "max_vote", "mean_vote", "votes"}
    assert all(wanted <= head.keys() for head in result["heads"])
    assert all(len(head["votes"]) == head["slots"] for head in result["heads"])


def test_the_command_needs_no_matplotlib_but_for_a_picture(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    monkeypatch.setattr(render, "find_spec", lambda name: None)
    text = tmp_path / "text.txt"
    text.write_text(NASTY * 12)
    args = ["inspect", str(text), "--model", folder, "--png", str(tmp_path / "figure.png")]
    status, out, err = run(monkeypatch, capsys, *args)
    assert (status, out) == (2, "")
    assert "pip install 'keepkv[plot]'" in err
    assert "keepkv[plot]" in run(monkeypatch, capsys, "inspect", "--help")[1]
