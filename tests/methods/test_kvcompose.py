"""KVCompose: what the second reading pays, and composite tokens."""

from __future__ import annotations

from dataclasses import replace

import torch

from helpers import make_model, tokens
from keepkv import KeepCache, methods
from keepkv.methods import kvcompose
from methods.observed import INF, seen

KVCOMPOSE = methods.get("kvcompose")


def test_it_scores_what_a_second_reading_pays() -> None:
    """Against transformers' own attention weights over the text and the second reading of it, in float64."""
    model, ids = make_model("llama", torch.float64), tokens(1, 60)
    cache = KeepCache(model, auto=False, method="kvcompose")
    model(ids, past_key_values=cache)
    cache.repeat(model, ids)
    model.set_attn_implementation("eager")
    twice = model(torch.cat([ids, ids], 1), output_attentions=True).attentions
    for observation, attention in zip(cache.observations(), twice, strict=True):
        paid = attention[0, :, 60:, :60].amax(1).unflatten(0, (2, 2)).mean(1)  # [H, T]
        expected = paid + paid.mean(0, keepdim=True)
        torch.testing.assert_close(kvcompose.asked_in_layer(observation).double(), expected, rtol=1e-5, atol=1e-7)


def test_the_mean_over_heads_is_of_the_same_token_where_heads_hold_different_ones() -> None:
    peak = torch.tensor([[0.5, 0.2, 0.1], [0.0, 0.4, 0.3]])
    positions = torch.tensor([[0, 3, 5], [-1, 3, 4]])
    bias = torch.tensor([[0.0, 0.0, 0.0], [-INF, 0.0, 0.0]])
    observation = replace(seen(3), repeat_peak=peak, key_positions=positions, bias=bias, read=6)
    expected = torch.tensor([[0.75, 0.5, 0.15], [0.25, 0.7, 0.45]])
    torch.testing.assert_close(kvcompose.asked_in_layer(observation)[observation.present], expected[observation.present])


def test_composite_tokens_compete_over_layers() -> None:
    scores = torch.rand(3, 2, 40, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.01])[:, None, None]
    composed = [(float(score), layer) for layer in range(3) for score in scores[layer].sort(-1, True).values.mean(0)]
    best = [layer for _, layer in sorted(composed, reverse=True)[:50]]
    counts = kvcompose.composite(scores, 100)
    assert counts[:2] == [[best.count(layer)] * 2 for layer in range(2)] or counts[2] == [1, 1]  # at least one in each layer
    assert sum(map(sum, counts)) == 100
    assert counts[2][0] >= 1
    first = kvcompose.composite(scores, 100, first_largest=True)
    assert first[0][0] == max(map(max, first))
    assert first[0][0] > counts[0][0]


def test_heads_of_a_layer_choose_their_own_tokens_and_get_as_many() -> None:
    model = make_model("llama", torch.float32)
    cache = KeepCache(model, 0.3, "kvcompose").read(model, tokens(1, 90))
    counts = [layer.slots.counts for layer in cache.keep_layers]
    assert all(len(set(layer)) == 1 for layer in counts)
    assert len({layer[0] for layer in counts}) > 1
    assert any(len({tuple(head.tolist()) for head in torch.split(x.slots.positions, x.slots.counts)}) > 1 for x in cache.layers)
