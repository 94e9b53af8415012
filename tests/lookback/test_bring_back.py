"""What comes back is what was there, and the compact cache stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers import EVERYTHING, make_model, tokens
from keepkv import KeepCache, KeepKVError
from keepkv.lookback.bring_back import Source, brought_back, exact, without
from keepkv.lookback.bring_back import tokens as again

LENGTH = 150
SPANS = [(3, 40), (60, 61), (90, 130)]


def read(model: PreTrainedModel, ids: Tensor) -> KeepCache:
    cache = KeepCache(model, auto=False)
    model(ids, past_key_values=cache)
    return cache


def logits(model: PreTrainedModel, cache: KeepCache, ids: Tensor) -> Tensor:
    return model(ids, past_key_values=cache.fork()).logits


def source(kind: str, model: PreTrainedModel, whole: KeepCache, ids: Tensor) -> Source:
    return exact(whole) if kind == "exact" else again(model, ids)


@pytest.mark.parametrize("kind", ["exact", "again"])
@pytest.mark.parametrize("slot_dtype", ["float", "int8"])
def test_with_everything_back_it_is_the_full_cache(family: str, kind: str, slot_dtype: str) -> None:
    model, ids, later = make_model(family, torch.float32), tokens(1, LENGTH), tokens(1, 9, seed=1)
    whole = read(model, ids)
    compact = whole.fork().compress("10%", "snapkv", slot_dtype=slot_dtype)
    back = brought_back(compact, [(0, LENGTH)], source(kind, model, whole, ids))
    expected = logits(model, whole, later)
    assert (logits(model, compact, later) - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, back, later), expected, rtol=0, atol=1e-4)
    for token in later[0].split(1):  # and while writing
        ours, theirs = (model(token[None], past_key_values=cache).logits for cache in (back, whole))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_read_again_over_slots_that_lost_nothing_is_the_exact_past(family: str) -> None:
    model, ids, later = make_model(family), tokens(1, LENGTH), tokens(1, 9, seed=1)
    whole = read(model, ids)
    compact = whole.fork().compress("25%", EVERYTHING, slot_dtype="float")
    assert compact.layers[-1].slots is not None
    ours, theirs = (source(kind, model, whole, ids)(compact, SPANS) for kind in ("again", "exact"))
    for pair, exact_pair in zip(ours, theirs, strict=True):
        torch.testing.assert_close(pair, exact_pair)
    back = brought_back(compact, SPANS, again(model, ids))
    torch.testing.assert_close(logits(model, back, later), logits(model, whole, later))


def test_the_compact_cache_stays_as_it_is(family: str) -> None:
    model, ids = make_model(family), tokens(1, LENGTH)
    whole = read(model, ids)
    for cache in (whole.fork().compress("25%", slot_dtype="int4"), whole.fork().compress("25%")):
        before = [[x.clone() for x in (layer.keys, layer.values, *layer.slots.tensors)] for layer in cache.keep_layers]
        held = [[*vars(layer).values()] for layer in cache.layers]
        for kind in ("exact", "again"):
            back = brought_back(cache, SPANS, source(kind, model, whole, ids))
            model(tokens(1, 20, seed=2), past_key_values=back)
        assert all(
            a is b for x, layer in zip(held, cache.layers, strict=True) for a, b in zip(x, vars(layer).values(), strict=True)
        )
        after = [[layer.keys, layer.values, *layer.slots.tensors] for layer in cache.keep_layers]
        assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("slot_dtype", ["float", "bfloat16", "int8", "int4"])
def test_slots_that_stay_are_the_same_slots(slot_dtype: str) -> None:
    model, ids = make_model(), tokens(1, 300)
    slots = read(model, ids).compress("70%", slot_dtype=slot_dtype).layers[1].slots
    left = without(slots, [(0, 10), (100, 170), (295, 300)])
    positions = slots.positions
    stay = ~((positions < 10) | ((positions >= 100) & (positions < 170)) | (positions >= 295))
    assert 0 < stay.sum() < len(stay)
    for name in ("keys", "values", "bias", "positions"):
        assert torch.equal(getattr(left, name)[:], getattr(slots, name)[:][stay])
    assert left.counts == [int(stay[lo:hi].sum()) for lo, hi in zip(slots.offsets, slots.offsets[1:], strict=False)]
    assert without(slots, [(0, 300)]).counts == [0, 0]


def test_the_backing_is_an_exact_source_too() -> None:
    model, ids = make_model(), tokens(1, LENGTH)
    whole = read(model, ids)
    cache = KeepCache(model, "100", EVERYTHING, chunk=32, backing="cpu", tail=8, slot_dtype="float").read(model, ids)
    spans = [(0, 5), (30, 70), (LENGTH - 20, LENGTH - 8)]
    ours, theirs = exact(cache)(cache, spans), exact(whole)(cache, spans)
    for pair, exact_pair in zip(ours, theirs, strict=True):
        torch.testing.assert_close(pair, exact_pair)


def test_what_cannot_be_brought_back_is_refused() -> None:
    model, ids = make_model(), tokens(2, LENGTH)
    compact = read(model, ids[:1]).compress("25%")
    with pytest.raises(KeepKVError, match="no exact keys and values"):
        brought_back(compact, SPANS, exact(compact))
    with pytest.raises(KeepKVError, match="one row, got 2"):
        brought_back(read(model, ids).compress("25%"), SPANS, again(model, ids))
    whole = read(model, ids[:1])
    with pytest.raises(KeepKVError, match="nothing in this cache was compressed"):
        brought_back(whole, SPANS, exact(whole))
