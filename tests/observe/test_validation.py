"""Validation rows: what they say is lost is what attention over slots and newer tokens really loses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers import randn
from keepkv.merge.merged import Merged, evict
from keepkv.observe.references import context
from keepkv.observe.validation import LEAST, NEWEST, Validation
from keepkv.ops.rope import Rotation
from keepkv.ops.softmax import PLAIN, Softmax, shares
from keepkv.types import Observation

TOKENS, HEADS, GROUP, SIZE = 160, 2, 3, 16
FIRST = TOKENS - TOKENS // NEWEST


def seen(projected: bool, voted: bool = False, peak: Tensor | None = None, softmax: Softmax = PLAIN) -> Observation:
    observation = Observation(
        keys=2 * randn(HEADS, TOKENS, SIZE, seed=1),
        values=randn(HEADS, TOKENS, SIZE, seed=2),
        queries=randn(HEADS, GROUP, TOKENS, SIZE, seed=3),
        query_positions=torch.arange(TOKENS),
        rotation=Rotation.halves(torch.ones(SIZE // 2)),
        scale=0.25,
        repeat_peak=peak,
        softmax=softmax,
        projection=randn(HEADS, GROUP, SIZE, 24, seed=4) if projected else None,
    )
    if voted:
        bias = torch.rand(HEADS, TOKENS, generator=torch.Generator().manual_seed(5))
        bias[1, :20] = -torch.inf
        places = torch.arange(TOKENS).expand(HEADS, -1).masked_fill(bias.isneginf(), -1)
        observation = replace(observation, bias=bias, key_positions=places, read=TOKENS)
    return replace(observation, references=context(observation))


def attended(layer: Observation, head: int, keys: Tensor, values: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """Outputs [G, R, d_v] in float64 of all queries of the newest quarter over these entries."""
    queries = layer.queries[head, :, FIRST:].double() * layer.scale
    logits = layer.softmax.capped(queries @ keys.double().T) + bias.double()
    logits = logits.masked_fill(positions > torch.arange(FIRST, TOKENS)[:, None], -torch.inf)
    sinks = layer.softmax.of_groups(HEADS)
    return shares(logits, None if sinks is None else sinks[head][:, None].double()) @ values.double()


def bias_of(layer: Observation, head: int) -> Tensor:
    return torch.zeros(TOKENS) if layer.bias is None else layer.bias[head]


def expected(layer: Observation, kept: list[Tensor], merged: list[Merged]) -> list[float]:
    """The definition: W_O (Y' - Y), Y' over the slots of older tokens and the newest quarter."""
    exact, changed = [], []
    for head, (entries, slots) in enumerate(zip(kept, merged, strict=True)):
        places = layer.positions[head]
        exact.append(attended(layer, head, layer.keys[head], layer.values[head], bias_of(layer, head), places))
        older, newer = places[entries] < FIRST, places >= FIRST
        keys = torch.cat([slots.keys[older], layer.keys[head, newer]])
        values = torch.cat([slots.values[older], layer.values[head, newer]])
        bias = torch.cat([slots.bias[older], bias_of(layer, head)[newer]])
        changed.append(attended(layer, head, keys, values, bias, torch.cat([places[entries][older], places[newer]])))
    if layer.projection is None:
        pairs = zip(exact, changed, strict=True)
        return [float((y2 - y).square().sum(-1).mean() / y.square().sum(-1).mean() / HEADS) for y, y2 in pairs]
    weights = [weight.double() for weight in layer.projection]
    whole = sum(torch.einsum("grv,gvd->rd", y, w) for y, w in zip(exact, weights, strict=True))
    parts = [torch.einsum("grv,gvd->rd", y2 - y, w) for y, y2, w in zip(exact, changed, weights, strict=True)]
    return [float(part.square().sum(-1).mean() / whole.square().sum(-1).mean()) for part in parts]


SINKS_AND_CAP = Softmax(2.0, torch.linspace(-1, 2, HEADS * GROUP))


@pytest.mark.parametrize("softmax", [PLAIN, SINKS_AND_CAP], ids=["plain", "sinks and cap"])
@pytest.mark.parametrize("voted", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_what_is_lost_is_what_attention_beside_newer_tokens_loses(projected: bool, voted: bool, softmax: Softmax) -> None:
    layer = seen(projected, voted, softmax=softmax)
    kept = [torch.arange(30, TOKENS, 3), torch.arange(25, 90, 2)]
    merged = [evict(layer.keys[head], layer.values[head], kept[head], layer.head_bias(head)) for head in range(HEADS)]
    merged[0] = merged[0]._replace(bias=merged[0].bias + 1, values=merged[0].values * 0.9)  # as a fit may leave them
    rows = Validation.of(layer)
    assert rows is not None
    assert rows.lost(kept, merged, layer.positions) == pytest.approx(expected(layer, kept, merged), rel=1e-4)


def test_nothing_is_lost_where_every_older_entry_stays_as_it_is() -> None:
    layer = seen(True, voted=True)
    kept = [layer.present[head].nonzero()[:, 0] for head in range(HEADS)]
    merged = [evict(layer.keys[head], layer.values[head], kept[head], layer.head_bias(head)) for head in range(HEADS)]
    rows = Validation.of(layer)
    assert rows is not None
    assert max(rows.lost(kept, merged, layer.positions)) < 1e-10


def test_what_the_repetition_asks_in_vain_counts_as_the_heads_share_of_the_layer() -> None:
    """A head that drops all that is asked for loses its whole part of the layer's output once more."""
    peak = torch.zeros(HEADS, TOKENS)
    peak[:, 40] = TOKENS**0.5  # the mean square share of a repetition's row is 1
    layer, silent = seen(True, peak=peak), seen(True)
    kept = [torch.arange(50, 100)] * HEADS
    merged = [evict(layer.keys[head], layer.values[head], kept[head]) for head in range(HEADS)]
    asked, unasked = Validation.of(layer), Validation.of(silent)
    assert asked is not None
    assert unasked is not None
    losses = zip(asked.lost(kept, merged, layer.positions), unasked.lost(kept, merged, layer.positions), strict=True)
    zero = [Merged(slots.keys[:0], slots.values[:0], slots.bias[:0]) for slots in merged]
    sizes = [asked._size(head, asked.outputs[head]) for head in range(HEADS)]
    assert [more - less for more, less in losses] == pytest.approx([float(size) for size in sizes], rel=1e-4)
    assert all(loss > 0 for loss in unasked.lost([torch.arange(0)] * HEADS, zero, layer.positions))


def test_a_text_whose_newest_quarter_asked_too_little_judges_nothing() -> None:
    layer = seen(True)
    few = slice(0, FIRST + LEAST - 1)
    assert (
        Validation.of(replace(layer, queries=layer.queries[:, :, few], query_positions=torch.arange(FIRST + LEAST - 1))) is None
    )


def test_a_head_that_looks_at_older_tokens_alone_and_keeps_none_of_them_loses_at_most_everything() -> None:
    """As a first layer's heads do that attend to the first token: there is no mass left to divide by."""
    layer = seen(True)
    keys = layer.keys.clone()
    keys[:, 3] = 40 * layer.queries.mean((1, 2))  # no newer key comes near
    queries = layer.queries.mean((1, 2), keepdim=True).expand_as(layer.queries)
    layer = replace(layer, keys=keys, queries=queries * 100)
    layer = replace(layer, references=context(layer))
    kept = [torch.arange(50, 90)] * HEADS
    merged = [evict(layer.keys[head], layer.values[head], kept[head]) for head in range(HEADS)]
    rows = Validation.of(layer)
    assert rows is not None
    assert float(rows.rest.min()) >= 0
    assert all(0 < loss <= 1 for loss in rows.lost(kept, merged, layer.positions))
