"""Choosing what stays: the best scores, what is protected, and elimination of what others can replace."""

from __future__ import annotations

import pytest
import torch

from helpers import randn
from keepkv import choose
from keepkv.merge import fit
from keepkv.observe.references import attend_all
from keepkv.types import Observation


def test_the_best_are_chosen_and_the_first_of_equals() -> None:
    assert choose.best(torch.tensor([1.0, 3, 3, 3, 0]), 2).tolist() == [1, 2]
    assert choose.best(torch.zeros(9), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("slots", "sinks", "recent"), [(100, 4, 32), (20, 4, 10), (8, 2, 4), (4, 1, 2)])
def test_small_budgets_protect_less(slots: int, sinks: int, recent: int) -> None:
    guarded = choose.protect(torch.zeros(200), torch.arange(200), 200, slots, 4, 32).isinf()
    assert guarded[:sinks].all()
    assert guarded[200 - recent :].all()
    assert guarded.sum() == sinks + recent


def test_eliminating_answers_better_than_the_best_scores() -> None:
    """Groups of alike tokens, which score alike: over a dozen draws, 24 slots lose less when chosen together."""
    ours, best = 0.0, 0.0
    for seed in range(12):
        centre = 2 * randn(6, 8, seed=seed)
        keys = (centre[torch.arange(240) % 6] + 0.5 * randn(240, 8, seed=seed + 100))[None]
        values = randn(1, 240, 4, seed=seed + 200)
        reference = attend_all(randn(1, 800, 8, seed=seed + 300), keys, values)
        seen = Observation(keys, values, randn(1, 1, 4, 8), torch.arange(4), torch.ones(4), 1.0, references=reference)
        distance = (values - values.mean(1, keepdim=True)).norm(dim=-1)
        chosen = [rule(seen, reference.rms_share * distance, [24])[0].kept for rule in (choose.eliminate, choose.top)]
        fits = [fit.fit(values, [kept], seen.rows(slice(1)))[0].error for kept in chosen]
        ours, best = ours + fits[0], best + fits[1]
    assert ours < best


def test_elimination_keeps_the_count_the_order_and_what_must_stay() -> None:
    keys, values = randn(1, 30, 8), randn(1, 30, 4, seed=1)
    reference = attend_all(randn(1, 64, 8, seed=2), keys, values)
    seen = Observation(keys, values, randn(1, 1, 4, 8), torch.arange(4), torch.ones(4), 1.0, references=reference)
    scores = torch.rand(1, 30, generator=torch.Generator().manual_seed(3))
    scores[0, [4, 14, 24]] = torch.inf
    for count in (3, 5, 17, 30):
        kept = choose.eliminate(seen, scores, [count])[0].kept.tolist()
        assert len(kept) == count
        assert kept == sorted(set(kept))
        assert {4, 14, 24} <= set(kept)
