"""The exact history behind a live cache, and refreshing from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from helpers import EVERYTHING, make_model, tokens
from keepkv import InputError, KeepCache, KeepKVError


def log_probs(model, ids, cache) -> torch.Tensor:
    return model(ids, past_key_values=cache).logits.double().log_softmax(-1)


@pytest.mark.parametrize("backing", ["cpu", "disk"])
@pytest.mark.parametrize("tail", [0, 6])
def test_a_refresh_is_a_compression_of_the_exact_history(backing: str, tail: int) -> None:
    """With folds that lose nothing of what the model computes, refreshing is compressing everything at once."""
    model, ids, mask = make_model(), tokens(2, 130), torch.ones(2, 130, dtype=torch.int64)
    mask[1, :21] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    live = KeepCache(model, 0.5, EVERYTHING, period=20, backing=backing, references=2048, tail=tail, slot_dtype="float")
    once = KeepCache(model, 0.3, auto=False, period=1000, references=2048, tail=tail, slot_dtype="float")
    for lo, hi in ((0, 70), (70, 90), (90, 115), (115, 130)):
        for cache in (live, once):
            options = {"attention_mask": mask[:, :hi], "position_ids": positions[:, lo:hi]}
            model(ids[:, lo:hi], past_key_values=cache, **options)
    assert live.report().compressions > 1
    assert live.report().backing_bytes > 0
    for a, b in zip(live.keep_layers, once.keep_layers, strict=True):  # remembered queries are rounded, so: the same ones
        b.watch = replace(b.watch, banks=a.watch.banked(a.state).banks, pending=(), waiting=0)
    live.policy = once.policy
    live.refresh()
    once.compress()
    for a, b in zip(live.keep_layers, once.keep_layers, strict=True):
        assert torch.equal(a.slots.positions, b.slots.positions)
        torch.testing.assert_close(a.slots.values, b.slots.values, rtol=1e-4, atol=1e-4)


def test_refreshing_brings_back_what_folds_lost() -> None:
    """Folded eagerly by eviction of all but the newest, then refreshed: much closer to the full cache again."""
    model, ids = make_model(), tokens(1, 330)
    drifted, full = KeepCache(model, 40, "streaming", period=10, backing="cpu"), DynamicCache(config=model.config)
    for lo, hi in ((0, 260), (260, 270), (270, 280), (280, 290), (290, 300)):
        model(ids[:, lo:hi], past_key_values=drifted)
        model(ids[:, lo:hi], past_key_values=full)
    fresh = drifted.fork()
    fresh.policy = fresh.policy.changed(method="keepkv")
    fresh.refresh()
    truth = log_probs(model, ids[:, 300:], full)
    loss = [float((truth.exp() * (truth - log_probs(model, ids[:, 300:], c))).sum(-1).mean()) for c in (drifted, fresh)]
    assert loss[1] < 0.5 * loss[0]


def test_refresh_comes_while_a_prompt_is_read_in_chunks_too() -> None:
    """As after as many forward passes: reading is no other way of folding."""
    model, ids = make_model("llama", torch.float32), tokens(1, 257)
    fed, read = (KeepCache(model, 20, chunk=32, backing="cpu", refresh=64) for _ in range(2))
    for lo in range(0, 256, 32):
        model(ids[:, lo : lo + 32], past_key_values=fed)
    read.read(model, ids[:, :256])
    assert fed._refreshed == read._refreshed == 256
    pairs = zip(fed.keep_layers, read.keep_layers, strict=True)
    assert all(torch.equal(a.slots.values[:], b.slots.values[:]) for a, b in pairs)


def test_refresh_comes_by_itself_and_only_with_a_backing() -> None:
    model = make_model()
    cache = KeepCache(model, 40, period=10, backing="disk", refresh=50)
    model(tokens(1, 100), past_key_values=cache)
    refreshed = []
    for step in range(100):
        model(tokens(1, 1, seed=step), past_key_values=cache)
        refreshed.append(cache._refreshed)
    assert sorted(set(refreshed)) == [0, 110, 160] or sorted(set(refreshed)) == [100, 150, 200]
    with pytest.raises(InputError, match="needs a backing"):
        KeepCache(model, period=10, refresh=50)
    bare = KeepCache(model, 40, period=10)
    model(tokens(1, 100), past_key_values=bare)
    slots = bare.keep_layers[0].slots
    with pytest.raises(KeepKVError, match="nothing to refresh from"):
        bare.refresh()
    assert bare.keep_layers[0].slots is slots


def test_rows_with_a_backing_are_not_moved() -> None:
    model = make_model()
    cache = KeepCache(model, 30, period=10, backing="cpu")
    model(tokens(2, 60), past_key_values=cache)
    with pytest.raises(KeepKVError, match="cannot be moved"):
        cache.reorder_cache(torch.tensor([1, 0]))
    cache.reorder_cache(torch.tensor([0, 1]))
