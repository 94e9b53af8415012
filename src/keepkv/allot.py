"""Allot: how many slots each layer and head gets. scores [L, H, T] (inf: must be kept) -> counts [L][H], sum = total."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def uniform(scores: Tensor, total: int) -> list[list[int]]:
    """The same for every head; what does not divide goes to the first ones."""
    layers, heads, _ = scores.shape
    return _split(_shares([1.0] * (layers * heads), total, scores.shape[2]), heads)


def cosine_layers(scores: Tensor, total: int, last: float = 0.8) -> list[list[int]]:
    """Layer shares falling on a cosine from 1 to `last`, heads alike. PyramidInfer, arXiv 2405.12532, as KeepKV uses it."""
    layers, heads, tokens = scores.shape
    fall = [last + (1 - last) * (1 + math.cos(math.pi * layer / max(1, layers - 1))) / 2 for layer in range(layers)]
    return _split(_shares([share for share in fall for _ in range(heads)], total, tokens), heads)


def everywhere(scores: Tensor, total: int, floor: float = 0.3) -> list[list[int]]:
    """Global over layers and heads: each head first gets its best floor × average, the rest goes to the best anywhere.

    DESIGN section 5; AdaKV (arXiv 2407.11550) is the same within one layer.
    """
    layers, heads, tokens = scores.shape
    flat = scores.reshape(layers * heads, tokens)
    least = min(tokens, int(floor * total / len(flat)))
    safe = torch.zeros_like(flat, dtype=torch.bool)
    safe.scatter_(1, flat.topk(least, dim=1).indices, True)
    safe |= flat.isposinf()
    chosen = flat.masked_fill(safe, torch.inf).flatten().topk(total).indices
    counts: list[int] = torch.bincount(chosen // tokens, minlength=len(flat)).tolist()
    return _split(counts, heads)


def _shares(weights: list[float], total: int, most: int) -> list[int]:
    """Integers proportional to weights, at most `most` each, summing to total; the earlier heads take the remainder."""
    counts = [min(most, int(total * weight / sum(weights))) for weight in weights]
    left, order = total - sum(counts), 0
    while left > 0:
        if counts[order % len(counts)] < most:
            counts[order % len(counts)] += 1
            left -= 1
        order += 1
    return counts


def _split(counts: list[int], heads: int) -> list[list[int]]:
    return [counts[i : i + heads] for i in range(0, len(counts), heads)]
