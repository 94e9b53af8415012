"""Allotting slots to layers and heads: totals are met, bounds are kept."""

from __future__ import annotations

import torch

from keepkv import allot


def test_uniform_and_cosine_spend_exactly_the_total() -> None:
    scores = torch.rand(5, 3, 40)
    for rule in (allot.uniform, allot.cosine_layers, allot.everywhere):
        for total in (60, 61, 74, 599):
            counts = rule(scores, total)
            assert sum(map(sum, counts)) == total
            assert all(0 <= count <= 40 for layer in counts for count in layer)
    assert allot.uniform(scores, 61)[0] == [5, 4, 4]
    falling = [sum(layer) for layer in allot.cosine_layers(scores, 300)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < falling[0]


def test_global_budgets_follow_the_scores_above_a_floor() -> None:
    scores = torch.rand(2, 2, 100) * torch.tensor([[[1.0], [1.0]], [[1.0], [100.0]]])
    counts = allot.everywhere(scores, 80, floor=0.3)
    assert counts == [[6, 6], [6, 62]]


def test_budgets_by_need_make_a_slot_worth_the_same_everywhere() -> None:
    """Errors e = c / n: with n' in proportion to sqrt(c), the loss of one slot less, c / n'^2, is the same for all heads."""
    cost = torch.tensor([[1.0, 4.0], [9.0, 25.0]])
    tried = [[20, 40], [10, 30]]
    errors = (cost / torch.tensor(tried)).tolist()
    counts = allot.by_need(tried, tried, errors, [1000] * 4, 0)
    assert sum(map(sum, counts)) == 100
    torch.testing.assert_close(cost / torch.tensor(counts).square(), torch.full((2, 2), 11**2 / 100**2), rtol=0.15, atol=0)


def test_budgets_by_need_keep_their_bounds() -> None:
    counts = allot.by_need([[50, 50], [50, 50]], [[10, 10], [10, 10]], [[0.0, 1e-4], [0.5, 1.5]], [90] * 4, 7)
    assert sum(map(sum, counts)) == 200
    assert min(map(min, counts)) == 15  # .3 of the average
    assert max(map(max, counts)) == 90
    assert min(map(min, allot.by_need([[30, 30]], [[10, 10]], [[0.0, 1.0]], [100] * 2, 25))) == 25


def test_rules_for_all_heads_together_give_each_the_same() -> None:
    scores = torch.rand(4, 3, 50)
    for rule in (allot.together(allot.uniform), allot.together(allot.cosine_layers), allot.alike):
        for total in (121, 240, 600):
            counts = rule(scores, total)
            assert all(len(set(layer)) == 1 for layer in counts)
            assert total - 12 < sum(map(sum, counts)) <= total
