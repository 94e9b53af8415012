"""What a cache and its report say when they are printed, in a terminal and in a notebook."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers import Page, make_model, tokens
from keepkv import KeepCache, Report, render
from keepkv.cache.report import Head

NASTY = "<script>alert('&amp;')</script>"


def compressed(rows: int = 1, **options) -> KeepCache:
    model = make_model("gemma3", torch.float32)
    cache = KeepCache(model, **{"budget": 0.25, **options})
    model(tokens(rows, 80), past_key_values=cache)
    model(tokens(rows, 3, seed=1), past_key_values=cache)
    return cache


def test_a_cache_prints_as_one_line() -> None:
    model = make_model("llama", torch.float32)
    empty = KeepCache(model)
    nothing = "tokens=0, slots_per_head=None, tail=0, bytes=0 B, live=False"
    assert repr(empty) == f"KeepCache(method='keepkv', budget='10%', {nothing})"
    cache = compressed(method="snapkv")
    assert repr(cache).startswith("KeepCache(method='snapkv', budget='0.25', tokens=83, slots_per_head=56.5, tail=3, bytes=")
    assert repr(cache).endswith(" kB, live=False)")
    assert "tokens=[83, 83]" in repr(compressed(2))
    live = compressed(period=50)
    assert "live=True" in repr(live)
    uncompressed = compressed(auto=False)
    assert "slots_per_head=None, tail=83" in repr(uncompressed)


def test_a_cache_can_be_printed_in_the_middle_of_its_first_reading() -> None:
    model = make_model("llama", torch.float32)
    cache = KeepCache(model)
    said = []
    model.model.layers[1].register_forward_hook(lambda *_: said.append(f"{cache!r} {cache._repr_html_()}"))
    model(tokens(1, 80), past_key_values=cache)
    assert "nothing has been read yet" in said[0]


@pytest.mark.parametrize(
    "options", [{}, {"method": "snapkv"}, {"period": 8, "backing": "cpu"}, {"slot_dtype": "int4"}, {"auto": False}]
)
def test_a_report_prints_as_aligned_text(options: dict) -> None:
    report = compressed(**options).report()
    lines = str(report).splitlines()
    names = {line[: line.index("  ")] for line in lines}
    column = max(map(len, names)) + 2
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)
    assert {"method", "budget", "tokens", "bytes"} <= names
    assert max(map(len, lines)) < 100
    assert ("slots per head" in names) == bool(report.heads)
    assert ("error" in names) == (report.error > 0)
    assert ("note" in names) == bool(report.note)
    assert ("queries" in names) == bool(report.watch_bytes)
    assert ("backing" in names) == bool(report.backing_bytes)
    assert len(repr(report).splitlines()) == 1
    assert "heads" not in repr(report).replace("slots_per_head", "")


def test_a_report_s_text_has_its_numbers() -> None:
    heads = (((Head(90, 0.02, 0.0, 0.1, 1, 31.4), Head(10, 0.04, 0.0, 0.1, 0, 2.0)),),)
    report = Report("keepkv", "10%", (1000,), heads, tail=5, kv_bytes=200_000, kv_bytes_full=2_000_000, repeat_seconds=4.0)
    text = str(replace(report, compress_seconds=9.0, longest_pause=6.0, compressions=2, slot_dtype="int4", note="for a test"))
    for line in (
        "tokens          1,000",
        "slots per head  50 (10 to 90), stored as int4",
        "tail            5 tokens held exactly",
        "bytes           200.0 kB instead of 2.0 MB, 10.0 times smaller",
        "error           3.00% of a head's output is lost on held-out queries",
        "largest vote    31.4 tokens",
        "fallbacks       1, in 1 of 2 heads",
        "repeating       4.0 s",
        "compressing     9.0 s in 2 compressions, at most 6.0 s each",
        "note            for a test",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize("options", [{}, {"rows": 2}, {"period": 8}, {"auto": False}, {"method": "minicache"}])
def test_a_notebook_shows_a_table_and_a_figure(options: dict) -> None:
    model = make_model("llama", torch.float32, num_hidden_layers=4)
    rows = options.get("rows", 1)
    cache = KeepCache(model, 0.4, **{name: value for name, value in options.items() if name != "rows"})
    model(tokens(rows, 80), past_key_values=cache)
    for shown in (cache, cache.report()):
        page = Page(shown._repr_html_())
        assert {"script", "link", "img", "iframe", "object", "style"}.isdisjoint(page.tags)
        assert {"src", "href", "srcset", "data", "action"}.isdisjoint(name for name, _ in page.attributes)
        assert "http" not in shown._repr_html_()
        assert "url(" not in shown._repr_html_()
        assert ("svg" in page.tags) == cache.compressed
        for value in cache.report().lines().values():
            assert value in page.words
        if cache.compressed:
            assert page.words.count(" slots") >= 4 * 2  # every layer and head says its number
            assert "layer 3, head 1:" in page.words


def test_what_a_notebook_shows_is_escaped() -> None:
    report = replace(compressed().report(), method=NASTY, note=NASTY)
    shown = report._repr_html_()
    assert "<script" not in shown
    assert Page(shown).words.count(NASTY) == 2


@pytest.mark.parametrize("slots", [[[0]], [[7, 7]], [[1, 10_000]] * 80, [[3] * 32], [[1], [2, 3]]])
def test_the_figure_holds_at_its_edges(slots: list[list[int]]) -> None:
    drawn = render.slots_figure(slots)
    page = Page(drawn)
    assert page.tags.count("title") == sum(map(len, slots))
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_the_figure_numbers_layers_as_the_model_does() -> None:
    model = make_model("gemma3", torch.float32)  # its first layer has a sliding window
    cache = KeepCache(model, "25%")
    model(tokens(1, 64), past_key_values=cache)
    assert cache.report().layers == (1, 2)
    figure = cache._repr_html_()
    assert "layer 2, head 0" in figure
    assert "layer 0, head 0" not in figure
