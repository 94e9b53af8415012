"""Repeating the text over its own cache: what it observes is true attention, and it decides what is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers import make_model, tokens
from keepkv import KeepCache, KeepKVError
from keepkv.observe.repetition import Repeat, attend_piece
from keepkv.slots.slots import Slots


def read(model, ids) -> KeepCache:
    cache = KeepCache(model, auto=False, slot_dtype="float")
    model(ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("family", ["llama", "llama-mqa", "gemma3", "phi3"])
def test_peaks_are_the_largest_shares_of_a_repetition(family: str) -> None:
    """Against eager attention over text + lead + text: one piece sees everything as it is."""
    model, ids, lead = make_model(family, torch.float32), tokens(1, 60), tokens(1, 5, seed=4)
    cache = read(model, ids).repeat(model, ids, lead, Repeat(chunk=60))
    model.set_attn_implementation("eager")
    weights = model(torch.cat([ids, lead, ids], 1), output_attentions=True).attentions
    for layer in cache.keep_layers:
        share = weights[layer.watch.layer][0, :, 60:, :60]
        wanted = share.unflatten(0, (layer.heads, -1)).amax((1, 2))
        torch.testing.assert_close(layer.watch.repeat_peak, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_the_middle_of_a_prompt_is_asked_from_its_end(family: str) -> None:
    """Against eager attention over text + lead + text, as if 40 more tokens stood between, which no window reaches across."""
    model, ids, lead = make_model(family, torch.float32), tokens(1, 60), tokens(1, 5, seed=4)
    cache = read(model, ids)
    cache._ahead = 40
    cache.repeat(model, ids, lead, Repeat(chunk=60))
    model.set_attn_implementation("eager")
    causal = torch.zeros(125, 125).masked_fill(torch.ones(125, 125, dtype=torch.bool).triu(1), -torch.inf)[None, None]
    mask = causal
    if family == "gemma3":
        local = causal.masked_fill(torch.ones(125, 125, dtype=torch.bool).tril(-model.config.sliding_window), -torch.inf)
        local[..., 60:, :60] = -torch.inf
        mask = {"full_attention": causal, "sliding_attention": local}
    places = torch.cat([torch.arange(60), 100 + torch.arange(65)])[None]
    weights = model(torch.cat([ids, lead, ids], 1), attention_mask=mask, position_ids=places, output_attentions=True).attentions
    for layer in cache.keep_layers:
        wanted = weights[layer.watch.layer][0, :, 60:, :60].unflatten(0, (layer.heads, -1)).amax((1, 2))
        torch.testing.assert_close(layer.watch.repeat_peak, wanted, rtol=1e-3, atol=1e-5)


def test_a_piece_over_a_draft_of_all_tokens_is_exact_attention() -> None:
    """Whatever the piece: what it does not see exactly it sees through the draft; only its own tokens are noted."""
    generator = torch.Generator().manual_seed(1)
    queries, keys, values = (torch.randn(2, n, 8, generator=generator) for n in (12, 46, 46))  # 40 tokens, 6 repeated
    stored = (keys[:, :40].flatten(0, 1), values[:, :40].flatten(0, 1), torch.zeros(80), torch.arange(40).repeat(2).int())
    draft = Slots(*stored, (0, 40, 80))
    output, peak = attend_piece(queries, keys, values, 6, draft, 10, 16)
    hidden = torch.ones(6, 46, dtype=torch.bool).triu(41).repeat(2, 1)
    share = (queries @ keys.transpose(1, 2)).masked_fill(hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(output, share @ values)
    torch.testing.assert_close(peak[:, 10:16], share[:, :, 10:16].amax(1))
    assert peak[:, :10].eq(0).all()
    assert peak[:, 16:].eq(0).all()


def test_pieces_gather_the_largest() -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, 90)
    told: list[tuple[int, int]] = []
    cache = read(model, ids).repeat(model, ids, how=Repeat(chunk=40), progress=lambda done, of: told.append((done, of)))
    assert told == [(40, 90), (80, 90), (90, 90)]
    for layer in cache.keep_layers:
        assert layer.watch.repeat_peak.shape == (2, 90)
        assert ((layer.watch.repeat_peak > 0) & (layer.watch.repeat_peak <= 1)).all()


def test_repeating_leaves_the_cache_as_it_was() -> None:
    model, ids = make_model(), tokens(1, 70)
    cache = read(model, ids)
    before = [(layer.keys, layer.values, layer.seen, layer.watch.banked(layer.state).banks) for layer in cache.keep_layers]
    cache.repeat(model, ids)
    after = [(layer.keys, layer.values, layer.seen, layer.watch.banks) for layer in cache.keep_layers]
    for (*old, known), (*new, asked) in zip(before, after, strict=True):
        assert all(a is b for a, b in zip(old, new, strict=True))
        assert torch.equal(known[0].queries, asked[0].queries)
    plain = read(model, ids)
    new = tokens(1, 4, seed=2)
    assert torch.equal(model(new, past_key_values=cache).logits, model(new, past_key_values=plain).logits)


def test_what_the_repetition_asks_for_is_kept_and_keeps_its_value() -> None:
    """A token that some head gave all its attention gets a slot there, with a vote near 1 and a value near its own."""
    model, ids = make_model("llama", torch.float32), tokens(1, 200)
    cache, plain = read(model, ids).repeat(model, ids), read(model, ids)
    wanted = 77
    for layer in cache.keep_layers:
        peak = torch.zeros(2, 200)
        peak[1, wanted] = 100.0
        layer.watch = replace(layer.watch, repeat_peak=peak)
    for layer, before in zip(cache.compress(0.1).keep_layers, plain.keep_layers, strict=True):
        positions = layer.slots.positions[layer.slots.offsets[1] :].tolist()
        assert wanted in positions
        slot = layer.slots.offsets[1] + positions.index(wanted)
        assert layer.slots.bias[slot].abs() < 0.02
        torch.testing.assert_close(layer.slots.values[slot], before.values[0, 1, wanted], rtol=0, atol=0.02)


def test_a_repetition_that_asks_for_nothing_changes_nothing() -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, 200)
    cache = read(model, ids).repeat(model, ids)
    for layer in cache.keep_layers:
        layer.watch = replace(layer.watch, repeat_peak=torch.zeros(2, 200))
    for ours, plain in zip(cache.compress(0.1).keep_layers, read(model, ids).compress(0.1).keep_layers, strict=True):
        assert torch.equal(ours.slots.positions, plain.slots.positions)
        torch.testing.assert_close(ours.slots.values, plain.slots.values, rtol=1e-4, atol=1e-5)


def test_another_text_or_a_compressed_cache_is_refused() -> None:
    model, ids = make_model(), tokens(1, 70)
    with pytest.raises(KeepKVError, match=r"expected \[1, 70\]"):
        read(model, ids).repeat(model, ids[:, 1:])
    with pytest.raises(KeepKVError, match="before compression"):
        read(model, ids).compress(0.5).repeat(model, ids)


def test_a_repetitions_queries_are_those_of_its_tokens() -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, 50)
    cache = KeepCache(model, auto=False)
    model(ids, past_key_values=cache)
    cache.repeat(model, ids, tokens(1, 5, seed=4), Repeat(chunk=20, draft=1, queries=True))
    twice = KeepCache(model, auto=False)
    model(torch.cat([ids, tokens(1, 5, seed=4), ids[:, :20]], 1), past_key_values=twice)
    layer, full = cache.keep_layers[0], twice.keep_layers[0]
    assert layer.watch.repeated.queries.shape[2] == 50 + 2 * 8  # pieces overlap by eight
    torch.testing.assert_close(
        layer.watch.repeated.queries[:, :, :20], full.watch.banked(full.state).banks[0].queries[:, :, -20:]
    )
