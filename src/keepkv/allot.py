"""Allot: how many slots each layer and head gets. scores [L, H, T] -> counts [L][H], sum = total.

A score of inf: must be kept; of -inf: there is no such entry, the head has fewer of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def uniform(scores: Tensor, total: int) -> list[list[int]]:
    """The same for every head; what does not divide goes to the first ones."""
    layers, heads, _ = scores.shape
    return split(shares([1.0] * (layers * heads), total, room(scores)), heads)


def alike(scores: Tensor, total: int) -> list[list[int]]:
    """Exactly the same for every head of every layer; what does not divide is not spent."""
    layers, heads, _ = scores.shape
    return [[min(total // (layers * heads), *room(scores))] * heads for _ in range(layers)]


def cosine_layers(scores: Tensor, total: int, last: float = 0.8) -> list[list[int]]:
    """Layer shares falling on a cosine from 1 to `last`, heads alike. PyramidInfer, arXiv 2405.12532, as KeepKV uses it."""
    layers, heads, _ = scores.shape
    fall = [last + (1 - last) * (1 + math.cos(math.pi * layer / max(1, layers - 1))) / 2 for layer in range(layers)]
    return split(shares([share for share in fall for _ in range(heads)], total, room(scores)), heads)


def everywhere(scores: Tensor, total: int, floor: float = 0.7) -> list[list[int]]:
    """Global over layers and heads: each head first gets its best floor × average, the rest goes to the best anywhere.

    DESIGN section 5; AdaKV (arXiv 2407.11550) is the same within one layer.
    """
    layers, heads, entries = scores.shape
    flat = scores.reshape(layers * heads, entries)
    least = min(entries, int(floor * total / len(flat)))
    safe = torch.zeros_like(flat, dtype=torch.bool)
    safe.scatter_(1, flat.topk(least, dim=1).indices, True)
    safe = (safe | flat.isposinf()) & ~flat.isneginf()
    chosen = flat.masked_fill(safe, torch.inf).flatten().topk(total).indices
    counts: list[int] = torch.bincount(chosen // entries, minlength=len(flat)).tolist()
    return split(counts, heads)


def within_layers(scores: Tensor, total: int, floor: float = 0.2) -> list[list[int]]:
    """The layers alike; within a layer each head first gets its best floor × average, the rest goes to the best of any head.

    AdaKV, arXiv 2407.11550, algorithm 1, with its safeguard of .2. Scores must be comparable over heads, as shares of
    attention are.
    """
    totals = shares([1.0] * len(scores), total, [sum(room(layer)) for layer in scores])
    return [everywhere(layer[None], count, floor)[0] for layer, count in zip(scores, totals, strict=True)]


def together(rule: Callable[[Tensor, int], list[list[int]]]) -> Callable[[Tensor, int], list[list[int]]]:
    """The rule for methods that keep the same entries in all heads of a layer; what the heads cannot share is not spent."""

    @wraps(rule)
    def for_all_heads(scores: Tensor, total: int) -> list[list[int]]:
        heads = scores.shape[1]
        return [counts * heads for counts in rule(scores[:, :1], total // heads)]

    return for_all_heads


def room(scores: Tensor) -> list[int]:
    """Entries of every head, the layers one after the other."""
    counts: list[int] = (~scores.isneginf()).sum(-1).flatten().tolist()
    return counts


def by_need(
    counts: list[list[int]], tried: list[list[int]], errors: list[list[float]], most: list[int], pinned: int, floor: float = 0.3
) -> list[list[int]]:
    """Counts × sqrt(e / n), as many in all: e [L][H] is what each head still lost of its output with n = tried slots.

    If the loss falls as 1 / n, a slot more is worth e / n, and slots in proportion to n sqrt(e / n) make it worth the same
    everywhere. No head gets less than the floor × average, or than the `pinned` entries that must stay, or more than `most`.
    """
    need = [
        [count * math.sqrt(max(error, 1e-9) / max(n, 1)) for count, n, error in zip(*heads, strict=True)]
        for heads in zip(counts, tried, errors, strict=True)
    ]
    flat, total = [weight for heads in need for weight in heads], sum(map(sum, counts))
    least = max(pinned, int(floor * total / len(flat)))
    return split(shares(flat, total, most, least), len(counts[0]))


def shares(weights: list[float], total: int, most: list[int], least: int = 0) -> list[int]:
    """Integers proportional to weights, from least to most each, summing to total; the earlier heads take the remainder."""

    def at(factor: float) -> list[int]:
        return [min(top, max(least, int(factor * weight))) for weight, top in zip(weights, most, strict=True)]

    low, high = 0.0, max(most) / max(min(weights), 1e-12)
    for _ in range(100):  # the factor that makes them sum to the total, or a little less
        factor = (low + high) / 2
        low, high = (factor, high) if sum(at(factor)) <= total else (low, factor)
    counts = at(low)
    left, order = total - sum(counts), 0
    while left > 0:
        if counts[order % len(counts)] < most[order % len(counts)]:
            counts[order % len(counts)] += 1
            left -= 1
        order += 1
    return counts


def split(counts: list[int], heads: int) -> list[list[int]]:
    return [counts[i : i + heads] for i in range(0, len(counts), heads)]
