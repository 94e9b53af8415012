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


def losses_of(scale: torch.Tensor, power: torch.Tensor, n: torch.Tensor, entries: int) -> torch.Tensor:
    """c n^-a (1 - n/T) for heads of T entries."""
    return scale * n.double() ** -power * (1 - n / entries)


def test_budgets_by_loss_make_the_last_slot_worth_the_same_everywhere_and_no_exchange_pays() -> None:
    scale = torch.tensor([1.0, 4.0, 9.0, 0.5], dtype=torch.float64)
    power = torch.tensor([0.5, 1.0, 1.5, 0.1], dtype=torch.float64)
    tried = [losses_of(scale, power, torch.full((4,), n), 1000).view(2, 2).tolist() for n in (32, 128)]
    counts = torch.tensor(allot.by_loss((32, 128), (tried[0], tried[1]), 800, [1000] * 4, floor=0.0)).flatten()
    assert counts.sum() == 800
    saved = losses_of(scale, power, counts - 1, 1000) - losses_of(scale, power, counts, 1000)
    gained = losses_of(scale, power, counts, 1000) - losses_of(scale, power, counts + 1, 1000)
    assert gained.max() <= saved.min() * 1.05  # nowhere is the next slot worth more than another's last one


def test_a_head_whose_slots_stand_only_for_themselves_is_kept_whole_where_that_pays() -> None:
    """Its loss falls in proportion to what is dropped: half of it is worth half of all of it."""
    copying, smooth = 1 - torch.tensor([32, 128]) / 1000, torch.tensor([32.0, 128.0]) ** -1.0
    losses = [[[float(a), float(b)] + [float(b)] * 8] for a, b in zip(copying, smooth, strict=True)]
    (counts,) = allot.by_loss((32, 128), (losses[0], losses[1]), 2000, [1000] * 10)
    assert counts[0] > 950
    assert sum(counts) == 2000


def test_budgets_by_loss_keep_their_bounds_whatever_the_losses_are() -> None:
    strange = [[0.0, 1e-4], [0.5, 1.5]]
    counts = allot.by_loss((10, 40), (strange, [[0.0, 0.0], [1.5, 0.5]]), 200, [90] * 4, 7)
    assert sum(map(sum, counts)) == 200
    assert min(map(min, counts)) >= 15  # .3 of the average
    assert max(map(max, counts)) <= 90
    assert min(map(min, allot.by_loss((10, 40), ([[0.0, 1.0]], [[0.0, 1.0]]), 60, [100] * 2, 25))) == 25
    assert allot.by_loss((10, 40), ([[0.0, 1.0]], [[0.0, 1.0]]), 60, [3, 100]) == [[3, 57]]
    assert allot.by_loss((10, 40), ([[0.0, 0.0]], [[0.0, 0.0]]), 60, [40, 40]) == [[30, 30]]


def test_rules_for_all_heads_together_give_each_the_same() -> None:
    scores = torch.rand(4, 3, 50)
    for rule in (allot.together(allot.uniform), allot.together(allot.cosine_layers), allot.alike):
        for total in (121, 240, 600):
            counts = rule(scores, total)
            assert all(len(set(layer)) == 1 for layer in counts)
            assert total - 12 < sum(map(sum, counts)) <= total
