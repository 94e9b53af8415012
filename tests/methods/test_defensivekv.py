"""DefensiveKV: the worst case over queries, the floor, value norms, and what attention is sure of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers import make_model, randn64, read, tokens
from keepkv import ModelError
from keepkv.methods import defensivekv
from methods.observed import INF, seen, shares

PROJECTION = randn64(2, 3, 16, 20, seed=3).float()


def formula(observation: object, first: float, slots: float | None) -> torch.Tensor:
    """The paper's steps one after the other, in float64, head by head and query by query."""
    a = shares(observation, 32)  # [H, G, 32, T]
    count = a.shape[3] - 32
    risk = torch.zeros(2, count, dtype=torch.float64)
    size = torch.zeros(2, count, dtype=torch.float64)
    for head in range(2):
        worst = torch.zeros(count, dtype=torch.float64)
        for query in a[head].flatten(0, 1)[:, :count]:
            padded = torch.nn.functional.pad(query, (2, 2))
            pooled = sum(padded[i : i + count] for i in range(5)) / 5
            worst = torch.maximum(worst, pooled * query.sum() / pooled.sum())
        risk[head] = worst.clamp(min=float(worst.mean()))
        for token in range(count):
            value = observation.values[head, token].double()
            size[head, token] = sum((value @ weight.double()).abs().sum() for weight in PROJECTION[head]) / 3
    risk = risk * size / size.sum(1, keepdim=True)
    most = risk.max()
    for head in range(2):
        mean = a[head].mean((0, 1))[:count]
        mean = mean / mean.sum()
        total = 0.0
        for number, token in enumerate(mean.argsort(descending=True).tolist()):
            total += float(mean[token])
            if total >= first - float(a[..., count:].sum(-1).mean()) or (slots is not None and number >= int(slots) - 32):
                break
            risk[head, token] = most
    return torch.cat([risk, torch.full((2, 32), INF, dtype=torch.float64)], 1)


@pytest.mark.parametrize(("first", "slots"), [(0.9, None), (0.9, 36.0), (0.9, 20.0), (0.0, None)])
def test_the_risk_is_the_paper_s(first: float, slots: float | None) -> None:
    observation = seen(90, projection=PROJECTION, slots=slots)
    got = defensivekv.defensive(observation, first=first).double()
    torch.testing.assert_close(got, formula(observation, first, slots), rtol=1e-4, atol=1e-8)


def test_one_query_is_enough_to_keep_a_token() -> None:
    """One query of 32 asks for token 10 alone: the mean forgets it, the worst case does not."""
    observation = seen(200, projection=torch.ones(2, 3, 16, 4))
    queries = torch.zeros_like(observation.queries)
    queries[:, :, 180] = 100 * observation.keys[:, None, 10]
    observation = replace(observation, queries=queries, values=torch.ones_like(observation.values))
    got = defensivekv.defensive(observation, first=0.0)[:, :168]
    assert ((got.argmax(1) >= 8) & (got.argmax(1) <= 12)).all()  # its neighborhood
    assert got[0, 10] > 10 * got[0, 100]
    quiet = got[0, 20:160]
    torch.testing.assert_close(quiet, quiet[:1].expand(140))  # the floor makes all others alike


def test_the_slots_go_where_the_risk_is() -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, 120)
    within, over = (read(model, ids, budget=50, method=name) for name in ("defensivekv", "layer-defensivekv"))
    assert [sum(layer.slots.counts) for layer in within.layers] == [100] * 3
    assert sum(sum(layer.slots.counts) for layer in over.layers) == 300
    assert len({sum(layer.slots.counts) for layer in over.layers}) > 1
    for cache in (within, over):
        for layer in cache.layers:
            for positions in torch.split(layer.slots.positions, layer.slots.counts):
                assert set(range(88, 120)) <= set(positions.tolist())


def test_without_readable_weights_it_says_so() -> None:
    with pytest.raises(ModelError, match="needs the output projection of every layer"):
        defensivekv.defensive(seen(60))
    assert defensivekv.defensive(seen(20)).eq(INF).all()
