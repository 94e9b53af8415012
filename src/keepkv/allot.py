"""Allot: how many slots each layer and each head gets, which papers call budget allocation.

Every rule maps scores [L, H, T] and a total to counts `[L][H]` that sum to the total. A score of +inf is of an entry that
must be kept, one of -inf says that there is no such entry: that head has fewer of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

Allot = Callable[[Tensor, int], list[list[int]]]


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


def by_need(
    counts: list[list[int]], tried: list[list[int]], errors: list[list[float]], most: list[int], pinned: int, floor: float = 0.3
) -> list[list[int]]:
    """Counts × sqrt(e / n), as many in all: heads that still lose much of their output get more. `docs/theory.md 5.3`.

    If a head's loss falls as 1 / n, one slot more is worth e / n, and slots in proportion to n sqrt(e / n) make it worth the
    same everywhere.

    Args:
        counts: `[L][H]`, the slots of every head so far.
        tried: `[L][H]`, n, the slots of every head in the trial.
        errors: `[L][H]`, e, the share of its output that every head lost in the trial.
        most: [L × H], the entries that every head has.
        pinned: Entries of a head that must stay.
        floor: No head gets less than this share of the average.

    Returns:
        `[L][H]`, with the same sum as `counts`.
    """
    need = [
        [count * math.sqrt(max(error, 1e-9) / max(n, 1)) for count, n, error in zip(*heads, strict=True)]
        for heads in zip(counts, tried, errors, strict=True)
    ]
    weights = [weight for heads in need for weight in heads]
    total = sum(map(sum, counts))
    least = max(pinned, int(floor * total / len(weights)))
    return split(shares(weights, total, most, least), len(counts[0]))


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
