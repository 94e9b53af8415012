"""Repeating the text over its own cache: what it observes is true attention, and it decides what is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import make_model, tokens
from keepkv import METHODS, KeepCache, KeepKVError
from keepkv.choose import pin


def read(model, ids) -> KeepCache:
    cache = KeepCache(model, auto=False)
    model(ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("family", ["llama", "llama-mqa", "gemma3", "phi3"])
def test_peaks_are_the_largest_shares_of_a_repetition(family: str) -> None:
    """Against eager attention over text + lead + text, renormalised over the text."""
    model, ids, lead = make_model(family, torch.float32), tokens(1, 60), tokens(1, 5, seed=4)
    cache = read(model, ids).rehearse(model, ids, lead, chunk=60)
    model.set_attn_implementation("eager")
    weights = model(torch.cat([ids, lead, ids], 1), output_attentions=True).attentions
    for layer in cache.keep_layers:
        over_text = weights[layer.watch.layer][0, :, 60:, :60]
        share = over_text / over_text.sum(-1, keepdim=True)
        wanted = share.unflatten(0, (layer.heads, -1)).amax((1, 2))
        torch.testing.assert_close(layer.watch.recall, wanted, rtol=1e-3, atol=1e-5)


def test_pieces_gather_the_largest() -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, 90)
    told: list[tuple[int, int]] = []
    cache = read(model, ids).rehearse(model, ids, chunk=40, progress=lambda done, of: told.append((done, of)))
    assert told == [(40, 90), (80, 90), (90, 90)]
    for layer in cache.keep_layers:
        assert layer.watch.recall.shape == (2, 90)
        assert ((layer.watch.recall > 0) & (layer.watch.recall <= 1)).all()


def test_rehearsing_leaves_the_cache_as_it_was() -> None:
    model, ids = make_model(), tokens(1, 70)
    cache = read(model, ids)
    before = [(layer.keys, layer.values, layer.seen, layer.watch.banks) for layer in cache.keep_layers]
    cache.rehearse(model, ids)
    after = [(layer.keys, layer.values, layer.seen, layer.watch.banks) for layer in cache.keep_layers]
    for old, new in zip(before, after, strict=True):
        assert all(a is b for a, b in zip(old, new, strict=True))
    plain = read(model, ids)
    new = tokens(1, 4, seed=2)
    assert torch.equal(model(new, past_key_values=cache).logits, model(new, past_key_values=plain).logits)


def test_what_is_recalled_keeps_its_slots() -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, 200)
    cache = read(model, ids).rehearse(model, ids)
    peaks = torch.stack([layer.watch.recall for layer in cache.keep_layers])
    method = replace(METHODS["keepkv"], recall=0.4)
    compact = cache.fork().compress(0.2, method)
    pinned = pin(torch.zeros_like(peaks), peaks, int(0.8 * (240 - 6 * 24))).isinf()
    for layer, wanted in zip(compact.keep_layers, pinned, strict=True):
        for head in range(2):
            lo, hi = layer.slots.offsets[head : head + 2]
            assert set(wanted[head].nonzero().flatten().tolist()) <= set(layer.slots.positions[lo:hi].tolist())
            assert {0, 1, 2, 3, *range(180, 200)} <= set(layer.slots.positions[lo:hi].tolist())  # and what is protected
    assert compact.report().slots == pytest.approx(40)


def test_another_text_or_a_compressed_cache_is_refused() -> None:
    model, ids = make_model(), tokens(1, 70)
    with pytest.raises(KeepKVError, match=r"expected \[1, 70\]"):
        read(model, ids).rehearse(model, ids[:, 1:])
    with pytest.raises(KeepKVError, match="before compression"):
        read(model, ids).compress(0.5).rehearse(model, ids)
