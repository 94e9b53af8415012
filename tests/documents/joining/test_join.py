"""Joined documents: keys stand where they say, and votes carry over."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from documents.joining.texts import LEAD, LENGTHS, read, split, texts
from helpers import make_model, tokens
from keepkv.documents.joining.join import join, merge_lead
from keepkv.slots.slots import Slots


def test_joined_keys_are_those_of_a_reading_at_the_new_place(family: str) -> None:
    model = make_model(family)
    cache = join(model, [read(model, ids) for ids in texts()], [LEAD] * 3)
    assert cache.get_seq_length() == sum(LENGTHS) - 2 * LEAD
    start = 0
    for number, ids in enumerate(texts()):
        shift = start - (LEAD if number else 0)
        there = DynamicCache(config=model.config)
        model(ids, position_ids=torch.arange(ids.shape[1])[None] + shift, past_key_values=there)
        skip = LEAD if number else 0
        for ours, theirs in zip(cache.layers, there.layers, strict=True):
            keys, values = theirs.keys[:, :, skip:], theirs.values[:, :, skip:]
            if ours.is_sliding:
                if number == 2:
                    assert torch.allclose(ours.keys, theirs.keys, atol=1e-5)
                continue
            end = start + keys.shape[2]
            assert torch.allclose(ours.keys[:, :, start:end], keys, atol=1e-5)  # its angles are float32
            assert torch.allclose(ours.values[:, :, start:end], values, atol=1e-5)
        start += ids.shape[1] - skip


def test_a_short_last_text_leaves_older_tokens_in_a_sliding_window() -> None:
    model = make_model("gemma3")
    parts = [read(model, tokens(1, length, seed=length)) for length in (40, 12, 9)]
    cache = join(model, parts, [LEAD] * 3)
    window = cache.layers[0]
    assert window.keys.shape[2] == window.sliding_window - 1
    lengths = [part.layers[0].values[:, :, max(0, LEAD - 17) :] for part in parts]
    newest = torch.cat([lengths[0], parts[1].layers[0].values[:, :, LEAD:], parts[2].layers[0].values[:, :, LEAD:]], 2)
    assert torch.equal(window.values, newest[:, :, 1 - window.sliding_window :])
    model(tokens(1, 4, seed=7), past_key_values=cache)


@pytest.mark.parametrize("method", ["keepkv", "snapkv", "minicache"])
def test_compressed_texts_keep_their_votes_and_attend_as_one_softmax(method: str) -> None:
    model = make_model("llama", num_hidden_layers=4)
    parts = [read(model, ids, 0.4, method) for ids in texts()]
    cache = join(model, parts, [LEAD] * 3)
    later = tokens(1, 3, seed=5)
    assert torch.isfinite(model(later, past_key_values=cache.fork()).logits).all()
    for layer, *old in zip(cache.keep_layers, *(part.keep_layers for part in parts), strict=True):
        positions = torch.split(layer.slots.positions, layer.slots.counts)
        assert all(bool((p.diff() > 0).all()) for p in positions)
        kept = [o.slots.bias[o.slots.positions >= LEAD] for o in old]
        assert torch.equal(layer.slots.bias[layer.slots.positions >= LEAD].sort().values, torch.cat(kept).sort().values)
    assert cache.report().tokens == (sum(LENGTHS) - 2 * LEAD,)


def test_the_lead_counts_once_and_its_votes_add_up() -> None:
    """Two slots of one key, p and q votes, one of each its own token: to any query one slot of p + q - 1 votes."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(7, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    first = Slots(keys[:5], values[:5], torch.tensor([3.0, 0.5, 0, 1, 0]), torch.tensor([0, 2, 7, 3, 9]).int(), (0, 3, 5))
    lead_keys = torch.cat([keys[:1], keys[5:6], keys[6:]])  # position 0 in both, 1 and 2 only in the other text
    lead = Slots(lead_keys, values[4:], torch.tensor([2.0, 0.7, -1.0]), torch.tensor([0, 1, 2]).int(), (0, 2, 3))
    made = merge_lead(first, lead)
    assert made.counts == [4, 3]
    assert made.positions.tolist() == [0, 1, 2, 7, 2, 3, 9]
    votes = made.bias.double().exp()
    assert votes[0] == pytest.approx(math.exp(3) + math.exp(2) - 1, rel=1e-6)
    mean = (math.exp(3) * values[0] + (math.exp(2) - 1) * values[4]) / (math.exp(3) + math.exp(2) - 1)
    assert torch.allclose(made.values[0], mean)
    assert torch.equal(made.values[1], values[5])
    assert torch.equal(made.bias[[1, 2, 3, 4]], torch.tensor([0.7, 0.5, 0, -1.0]))
    assert merge_lead(first, None) is first


def test_one_document_joined_is_itself(family: str) -> None:
    model = make_model(family, torch.float32)
    cache = read(model, texts()[0], 0.5, "keepkv")
    later = tokens(1, 6, seed=3)
    ours = model(later, past_key_values=join(model, [cache], [LEAD])).logits
    assert torch.equal(ours, model(later, past_key_values=cache.fork()).logits)


def test_a_tail_of_an_earlier_text_becomes_slots_of_one_vote() -> None:
    model = make_model()
    first, second = (read(model, ids, 0.5, "snapkv") for ids in texts()[:2])
    more = tokens(1, 6, seed=8)
    model(more, past_key_values=first)
    model(more, past_key_values=second)
    cache = join(model, [first, second], [LEAD, LEAD])
    assert cache.keep_layers[0].tail == 6
    assert cache.get_seq_length() == LENGTHS[0] + 6 + LENGTHS[1] - LEAD + 6
    one, two = (split(part.keep_layers[0].slots) for part in (first, second))
    expected = [{*a.tolist(), *range(40, 46), *(p for p in b.tolist() if p < LEAD)} for a, b in zip(one, two, strict=True)]
    moved = [{p + 46 - LEAD for p in b.tolist() if p >= LEAD} for b in two]
    held = split(cache.keep_layers[0].slots)
    assert [set(p.tolist()) for p in held] == [a | b for a, b in zip(expected, moved, strict=True)]
