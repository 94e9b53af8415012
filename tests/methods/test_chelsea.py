"""Chelsea: bipartite merging within chunks, weighted by degree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers import randn64
from keepkv.attend.states import exact
from keepkv.methods import chelsea
from keepkv.types import Choice
from methods.observed import INF, seen


@pytest.mark.parametrize("count", [5, 17, 30, 44, 59, 60])
def test_chelsea_meets_its_count_and_counts_every_token_once(count: int) -> None:
    observation, scores = seen(), torch.rand(2, 60)
    scores[:, [0, 30, 58, 59]] = INF
    chosen = chelsea.bipartite(observation, scores, [count, count], chunk=16)
    for head, choice in enumerate(chosen):
        assert len(choice.kept) == count
        made = chelsea.centroid(observation.keys[head].double(), observation.values[head].double(), choice)
        assert made.bias.exp().sum() == pytest.approx(60)
        for fixed in (0, 30, 58, 59):
            place = choice.kept.tolist().index(fixed)
            assert torch.equal(made.keys[place], observation.keys[head, fixed].double())
        logits = observation.queries[head, 0].double() @ made.keys.T
        full = observation.queries[head, 0].double() @ observation.keys[head].double().T
        assert ((logits + made.bias).logsumexp(1) <= full.logsumexp(1) + 1e-9).all()  # a mean key attends too quietly


def test_chelsea_merges_equal_neighbours_without_loss_for_every_query() -> None:
    keys, values = randn64(1, 30, 16).repeat_interleave(2, 1), randn64(1, 30, 8, seed=1).repeat_interleave(2, 1)
    observation = replace(seen(heads=1), keys=keys.float(), values=values.float())
    (choice,) = chelsea.bipartite(observation, torch.rand(1, 60), [30], chunk=16)
    made = chelsea.centroid(keys[0], values[0], choice)
    queries = randn64(40, 16, seed=7)
    before = exact(queries, keys[0], values[0], torch.zeros(60), 1.0)
    for ours, theirs in zip(exact(queries, *made[:3], 1.0), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_chelsea_in_two_steps_weighs_by_degree() -> None:
    """Merging what was merged gives the mean over all tokens, not the mean of means."""
    keys, values = randn64(7, 16), randn64(7, 8, seed=1)
    first = chelsea.centroid(keys, values, Choice(torch.tensor([0, 5, 6]), torch.tensor([0, 0, 0, 0, 0, 1, 2])))
    second = chelsea.centroid(*first[:2], Choice(torch.tensor([0]), torch.tensor([0, 0, 0])), first.bias)
    torch.testing.assert_close(second.keys[0], keys.mean(0))
    torch.testing.assert_close(second.bias.exp(), torch.tensor([7.0]))
