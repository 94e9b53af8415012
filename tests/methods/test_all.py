"""What holds for every method."""

from __future__ import annotations

import pytest
import torch

from helpers import make_model, read, tokens
from keepkv import KeepCache, methods
from keepkv.cache.report import held_bytes
from keepkv.methods import METHODS
from keepkv.slots.slot_dtype import SLOT_DTYPES

ALONE = [name for name, row in methods.METHODS.items() if not row.keeps_all and not (row.repeat and row.repeat.needed)]


@pytest.mark.parametrize("name", ALONE)
def test_a_row_of_a_left_padded_batch_is_compressed_as_if_alone(name: str) -> None:
    model, long, short = make_model("qwen3", torch.float32), tokens(1, 110), tokens(1, 70, seed=1)
    ids = torch.cat([long, torch.cat([torch.full((1, 40), 2), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    stored = "float" if METHODS[name].layer_pairs else "int8"  # named: rows choose a format together
    together = KeepCache(model, 0.3, name, slot_dtype=stored).read(model, ids, mask)
    for row, alone in enumerate((long, short)):
        cache = KeepCache(model, 0.3, name, slot_dtype=stored).read(model, alone)
        for ours, theirs in zip(together.keep_layers, cache.keep_layers, strict=True):
            part = ours.slots.rows([row], ours.heads)
            assert part.offsets == theirs.slots.offsets
            assert torch.equal(part.positions, theirs.slots.positions)
            torch.testing.assert_close(part.keys[:], theirs.slots.keys[:], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(part.values[:], theirs.slots.values[:], rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(part.bias, theirs.slots.bias, rtol=1e-2, atol=1e-2)


LENGTH = 120


@pytest.mark.parametrize("method", [name for name, row in sorted(METHODS.items()) if not row.keeps_all])
def test_every_method_spends_its_budget_and_no_more(method: str, family: str) -> None:
    model, ids = make_model(family, torch.float32), tokens(1, LENGTH)
    cache = read(model, ids, budget=0.15, method=method)
    report = cache.report()
    heads = sum(layer.heads for layer in cache.keep_layers)
    price = cache.keep_layers[0].price(SLOT_DTYPES[report.slot_dtype])
    budget = int(heads * (0.15 * LENGTH * price.token - price.head) / price.slot)
    slots = sum(sum(layer) for layer in report.kept[0])
    taken = held_bytes(x for layer in cache.keep_layers for x in layer.slots.tensors)
    assert taken <= 0.15 * LENGTH * heads * price.token
    if METHODS[method].layer_pairs:  # more slots in the same bytes
        assert (budget - heads) * price.slot * 0.95 <= taken <= budget * price.slot
        assert slots > budget
    else:
        alike = METHODS[method].same_tokens_in_all_heads or method == "kvcompose"  # the heads of a layer share equally
        spare = heads - 1 if alike else 0
        assert 0 <= budget - slots <= spare
    for layer in cache.keep_layers:
        if METHODS[method].same_tokens_in_all_heads:
            heads_positions = torch.split(layer.slots.positions, layer.slots.counts)
            assert all(torch.equal(positions, heads_positions[0]) for positions in heads_positions)
        for lo, hi in zip(layer.slots.offsets, layer.slots.offsets[1:], strict=False):
            kept = layer.slots.positions[lo:hi].tolist()
            assert kept == sorted(set(kept))
            assert hi == lo or 0 <= kept[0] <= kept[-1] < LENGTH
    assert model(tokens(1, 3, seed=9), past_key_values=cache).logits.isfinite().all()
    assert cache.get_seq_length() == LENGTH + 3


def entries(cache: KeepCache) -> int:
    """Slots and tail tokens really stored, for all layers and heads."""
    return sum(
        layer.keys.shape[:3].numel() + (0 if layer.slots is None else len(layer.slots.keys)) for layer in cache.keep_layers
    )


@pytest.mark.parametrize("method", [name for name, row in sorted(METHODS.items()) if not row.keeps_all])
def test_every_method_lives(method: str) -> None:
    """Read in chunks and folded while writing, each keeps to its budget and stays finite."""
    model = make_model("llama", torch.float32)
    cache = KeepCache(model, 30, method, chunk=40, period=20)
    cache.read(model, tokens(1, 170))
    heads = sum(layer.heads for layer in cache.keep_layers)
    for step in range(50):
        assert model(tokens(1, 1, seed=step), past_key_values=cache).logits.isfinite().all()
        assert METHODS[method].layer_pairs or entries(cache) <= (30 + 20) * heads
        assert cache.report().kv_bytes <= (30 + 20) * heads * cache.keep_layers[0].price().slot
    assert cache.get_seq_length() == 220
    assert METHODS[method].layer_pairs or cache.report().slots_per_head == 30
    kept = [x for layer in cache.keep_layers for x in layer.slots.positions.tolist()]
    assert min(kept) >= 0
    assert max(kept) < 220
