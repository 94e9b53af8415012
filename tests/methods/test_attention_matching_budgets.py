"""Attention Matching's budgets by exchange: error curves, their hull, and what exchanging ends in."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch

from helpers import make_model, randn64, tokens
from keepkv import KeepCache, allot
from keepkv.choose import best
from keepkv.methods import attention_matching
from keepkv.methods.attention_matching_budgets import between, convex_slopes, error_curve, gains
from keepkv.observe import references
from keepkv.types import Observation
from methods.observed import ROTATION

SLOTS = [0, 2, 5, 10, 40]


def observed(heads: int = 3, count: int = 80) -> Observation:
    """Heads of more and more diffuse attention, with references."""
    keys = randn64(heads, count, 16).float() * torch.tensor([3.0, 1.0, 0.3])[:heads, None, None]
    values, queries = randn64(heads, count, 8, seed=1).float(), randn64(heads, 400, 16, seed=2).float()
    ref = references.attend_all(queries, keys, values)
    return Observation(keys, values, queries[:, None], torch.arange(400), ROTATION, 1.0, references=ref)


def interpolated(slots: list[int], errors: list[float], n: int) -> float:
    """The error at n slots, on the greatest convex function below the points: the least of all chords over n."""
    chords = [
        errors[i] if slots[i] == n else errors[i] + (errors[j] - errors[i]) * (n - slots[i]) / (slots[j] - slots[i])
        for i in range(len(slots))
        for j in range(len(slots))
        if slots[i] <= n <= slots[j] and (i != j or slots[i] == n)
    ]
    return min(chords)


def test_slopes_are_those_of_the_hull() -> None:
    for seed in range(20):
        errors = [1.0, *torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist(), 0.0]
        hull = [interpolated(SLOTS, errors, n) for n in range(41)]
        expected = torch.tensor([max(0.0, a - b) for a, b in pairwise(hull)])
        torch.testing.assert_close(convex_slopes(SLOTS, errors), expected, rtol=1e-4, atol=1e-6)


def test_the_best_slopes_of_all_heads_are_what_exchanging_slots_greedily_ends_in() -> None:
    curves = [[1.0, 0.8, 0.3, 0.1, 0.0], [1.0, 0.2, 0.15, 0.12, 0.0], [1.0, 0.9, 0.85, 0.5, 0.0], [1.0, 0.4, 0.39, 0.05, 0.0]]
    losses = [[interpolated(SLOTS, errors, n) for n in range(41)] for errors in curves]
    counts = [12] * 4
    while True:  # one slot at a time, from whom it costs least to whom it helps most
        gain, to = max((losses[h][n] - losses[h][n + 1], h) for h, n in enumerate(counts) if n < 40)
        cost, whose = min((losses[h][n - 1] - losses[h][n], h) for h, n in enumerate(counts) if n and h != to)
        if gain - cost <= 1e-9:
            break
        counts[to] += 1
        counts[whose] -= 1
    scores = torch.stack([convex_slopes(SLOTS, errors) for errors in curves])[:, None]
    allotted = [layer[0] for layer in allot.everywhere(scores, 48, floor=0.0)]

    def loss(numbers: list[int]) -> float:
        return sum(losses[head][n] for head, n in enumerate(numbers))

    assert abs(loss(allotted) - loss(counts)) < 1e-6
    assert loss(allotted) < loss([12] * 4) - 0.1


def test_the_curve_is_what_is_lost_on_rows_that_were_held_out() -> None:
    observation = observed()
    rows = observation.rows(slice(0, 1))
    kept = [torch.arange(5), torch.arange(30)]
    got = error_curve(observation.values[0], kept, rows)
    queries = observation.references.queries[0, 7::8].double()
    keys, values = observation.keys[0].double(), observation.values[0].double()
    logits = queries @ keys.T
    exact = logits.softmax(-1) @ values
    for error, entries in zip(got, kept, strict=True):
        train = rows.take(torch.arange(0, 400, 2))
        fitted = attention_matching.match(observation.values[:1], [entries], train)[0]
        weight = (logits[:, entries] + fitted.bias.double() - logits.logsumexp(-1, keepdim=True)).exp()
        mass = weight.sum(1, keepdim=True)
        joined = mass / (mass + 1) * (weight / mass @ fitted.values.double())  # with newer tokens of mass 1 and value 0
        lost = (joined - exact / 2).square().sum(1) / (exact / 2).square().sum(1)
        torch.testing.assert_close(error, float(lost.clamp(max=1).mean()), rtol=1e-3, atol=1e-5)
    assert got[1] < got[0]


def test_entries_score_the_slope_at_their_rank() -> None:
    observation = observed()
    score = gains(observation)
    share = attention_matching.answered_most(observation)
    for head in range(3):
        order = share[head].argsort(descending=True)
        falling = score[head, order]
        assert (falling.diff() <= 0).all()
        torch.testing.assert_close(falling.sum(), torch.tensor(1.0))  # from losing all to losing nothing
        slots = [1, 4, 8, 16, 32]  # 1, 2, 5, 10, 20 and 40% of 80
        kept = [best(share[head], n) for n in slots]
        errors = error_curve(observation.values[head], kept, observation.rows(slice(head, head + 1)))
        torch.testing.assert_close(
            falling, convex_slopes(*between([0, *slots, 80], [1.0, *(error**2 for error in errors), 0.0]))
        )
    counts = allot.everywhere(score[None], 60, floor=0.0)[0]
    assert len(set(counts)) > 1


def test_between_measured_points_errors_fall_as_a_power_of_the_slots() -> None:
    slots, errors = between([0, 2, 18, 98, 200], [1.0, 0.5, 0.05, 0.2, 0.0], most=8)
    assert slots == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 98, 200]  # no power goes where the error rises, or from 0 or to 0
    for n, error in zip(slots[1:10], errors[1:10], strict=True):
        expected = 0.5 * (0.05 / 0.5) ** (math.log(n / 2) / math.log(9))
        assert abs(error - expected) < 1e-9


def test_heads_that_hold_fewer_entries_score_only_these() -> None:
    observation = observed(2)
    bias = torch.zeros(2, 80)
    bias[1, :20] = -torch.inf
    score = gains(replace(observation, bias=bias, references=observation.references))
    assert score[1, :20].isneginf().all()
    assert score[1, 20:].isfinite().all()


def test_a_model_s_budgets_are_spent_where_attention_is_hard_to_match() -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, 120)
    cache = KeepCache(model, 30, "attention-matching-budgets").read(model, ids)
    counts = [layer.slots.counts for layer in cache.keep_layers]
    assert sum(map(sum, counts)) == 180
    assert len({count for layer in counts for count in layer}) > 1
    assert min(map(min, counts)) >= 9  # .3 of the average
    for layer in cache.keep_layers:
        for positions in torch.split(layer.slots.positions, layer.slots.counts):
            assert positions[0] == 0  # the first tokens stay
