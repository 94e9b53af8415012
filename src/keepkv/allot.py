"""Allot: how many slots each layer and each head gets, which papers call budget allocation.

Every rule maps scores [L, H, T] and a total to counts `[L][H]` that sum to the total. A score of +inf is of an entry that
must be kept, one of -inf says that there is no such entry: that head has fewer of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor

Allot = Callable[[Tensor, int], list[list[int]]]
POWERS = (0.05, 2.5)  # of n, by which a head's loss may fall


def uniform(scores: Tensor, total: int) -> list[list[int]]:
    """The same number for every head; the remainder goes to the first heads.

    Example:
        >>> uniform(torch.zeros(2, 2, 100), 90)
        [[23, 23], [22, 22]]
    """
    layers, heads, _ = scores.shape
    return split(shares([1.0] * (layers * heads), total, room(scores)), heads)


def alike(scores: Tensor, total: int) -> list[list[int]]:
    """Exactly the same number for every head of every layer; the remainder is not spent.

    Example:
        >>> alike(torch.zeros(2, 2, 100), 90)
        [[22, 22], [22, 22]]
    """
    layers, heads, _ = scores.shape
    return [[min(total // (layers * heads), *room(scores))] * heads for _ in range(layers)]


def cosine_layers(scores: Tensor, total: int, last: float = 0.8) -> list[list[int]]:
    """The share of a layer falls on a cosine from 1 to .8 (`last`), and the heads of a layer are alike.

    PyramidInfer, arXiv 2405.12532, as KeepKV uses it.
    """
    layers, heads, _ = scores.shape
    fall = [last + (1 - last) * (1 + math.cos(math.pi * layer / max(1, layers - 1))) / 2 for layer in range(layers)]
    return split(shares([share for share in fall for _ in range(heads)], total, room(scores)), heads)


def everywhere(scores: Tensor, total: int, floor: float = 0.7) -> list[list[int]]:
    """All layers and heads compete for the slots, by score.

    Each head first gets .7 (`floor`) of the average for its best entries, and the rest goes to the best scores anywhere.
    `docs/theory.md 5.2`. AdaKV (arXiv 2407.11550) does the same within one layer.
    """
    layers, heads, entries = scores.shape
    flat = scores.reshape(layers * heads, entries)
    least = min(entries, int(floor * total / len(flat)))
    # What a head is sure of: its best entries and what must be kept, but nothing that only fills up a shorter head.
    safe = torch.zeros_like(flat, dtype=torch.bool)
    safe.scatter_(1, flat.topk(least, dim=1).indices, True)
    safe = (safe | flat.isposinf()) & ~flat.isneginf()
    # One competition for the whole total: what is safe wins it, and the best of the others take what is left.
    winners = flat.masked_fill(safe, torch.inf).flatten().topk(total).indices
    counts: list[int] = torch.bincount(winners // entries, minlength=len(flat)).tolist()
    return split(counts, heads)


def within_layers(scores: Tensor, total: int, floor: float = 0.2) -> list[list[int]]:
    """The layers are alike, and the heads of a layer compete for its slots, by score.

    Each head first gets .2 (`floor`) of the average for its best entries, and the rest goes to the best scores of any head.
    Scores must be comparable over heads, as shares of attention are. AdaKV, arXiv 2407.11550, algorithm 1, with its safeguard.
    """
    totals = shares([1.0] * len(scores), total, [sum(room(layer)) for layer in scores])
    return [everywhere(layer[None], count, floor)[0] for layer, count in zip(scores, totals, strict=True)]


def together(rule: Allot) -> Allot:
    """The rule, for methods whose heads keep the same entries: it sees one head of each layer, and all get what that one gets.

    What the heads of a layer cannot share equally is not spent.
    """

    @wraps(rule)
    def for_all_heads(scores: Tensor, total: int) -> list[list[int]]:
        heads = scores.shape[1]
        return [counts * heads for counts in rule(scores[:, :1], total // heads)]

    return for_all_heads


def by_loss(
    tried: tuple[int, int],
    losses: tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]],
    total: int,
    most: Sequence[int],
    pinned: int = 0,
    floor: float = 0.3,
) -> list[list[int]]:
    """Slots where they save most, by what every head lost in two trials. `docs/theory.md 5.3`.

    A head of T entries is taken to lose c n^-α (1 - n/T) with n slots: as a power of n where slots can stand for each other
    (α up to 2.5), in proportion to what is dropped where they cannot (α near 0), and nothing when all stay. c and α are those
    that give both trials' losses. With the same saving of the last slot everywhere, the sum of losses is the least.

    Args:
        tried: n of the first and of the second trial, the second one larger.
        losses: `[L][H]` of both trials.
        total: Slots over all heads.
        most: [L × H], T, the entries that every head has.
        pinned: Entries of a head that must stay.
        floor: No head gets less than this share of the average.

    Returns:
        `[L][H]`, which sum to `total`.

    Example:
        >>> by_loss((32, 128), ([[0.9, 0.4]], [[0.8, 0.1]]), 600, [1000, 1000])
        [[477, 123]]
    """
    few, many = tried
    size = torch.tensor(most, dtype=torch.float64)
    first, second = (torch.tensor(x, dtype=torch.float64).flatten().clamp(min=1e-12) for x in losses)
    rest = [(1 - n / size).clamp(min=1e-3) for n in tried]
    power = ((first / rest[0]) / (second / rest[1])).log() / math.log(many / few)
    power = power.clamp(*POWERS)
    scale = second / rest[1] * many**power
    least = size.clamp(max=max(1, pinned, int(floor * total / len(most))))

    def at(saving: Tensor) -> Tensor:
        """How many slots each head has, when one more would save so much."""
        low, high = torch.ones_like(size), size.clone()
        for _ in range(50):
            n = (low + high) / 2
            saved = scale * n**-power * (power / n * (1 - n / size) + 1 / size)
            low, high = torch.where(saved > saving, n, low), torch.where(saved > saving, high, n)
        return torch.minimum(low.maximum(least), size)

    low, high = -80.0, 20.0  # bisection: the largest saving, as a logarithm, that spends the total
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if at(torch.tensor(middle).exp()).sum() > total else (low, middle)
    wanted = at(torch.tensor(high).exp()).tolist()
    return split(shares(wanted, total, list(most), int(least.max())), len(losses[0][0]))


def shares(weights: list[float], total: int, most: list[int], least: int = 0) -> list[int]:
    """Whole numbers in proportion to weights that sum to `total`; the remainder goes to the first ones.

    Args:
        weights: One for each head.
        total: The sum, at most that of `most`.
        most: No head gets more than its own.
        least: No head gets less, unless it has less.

    Example:
        >>> shares([1.0, 1.0, 2.0], 10, [10, 10, 4])
        [3, 3, 4]
    """

    def at(factor: float) -> list[int]:
        return [min(top, max(least, int(factor * weight))) for weight, top in zip(weights, most, strict=True)]

    low = 0.0
    high = max(most) / max(min(weights), 1e-12)
    for _ in range(100):  # bisection: the largest factor with a sum that is not above the total
        factor = (low + high) / 2
        if sum(at(factor)) <= total:
            low = factor
        else:
            high = factor
    counts = at(low)
    left = total - sum(counts)
    head = 0
    while left > 0:
        if counts[head] < most[head]:
            counts[head] += 1
            left -= 1
        head = (head + 1) % len(counts)
    return counts


def room(scores: Tensor) -> list[int]:
    """How many entries every head has, [L × H], the layers one after the other."""
    counts: list[int] = (~scores.isneginf()).sum(-1).flatten().tolist()
    return counts


def split(counts: list[int], heads: int) -> list[list[int]]:
    """Counts [L × H] as `[L][H]`."""
    return [counts[i : i + heads] for i in range(0, len(counts), heads)]
