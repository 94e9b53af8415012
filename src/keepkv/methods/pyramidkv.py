"""PyramidKV: SnapKV's tokens, fewer of them the higher the layer. arXiv 2406.02069."""

from __future__ import annotations

from torch import Tensor

from keepkv import score
from keepkv.allot import room, shares, split
from keepkv.methods.base import Method


def pyramid(scores: Tensor, total: int, beta: float = 20.0) -> list[list[int]]:
    """Layers on a line from many slots to few; the heads of a layer are alike. PyramidKV, arXiv 2406.02069.

    With C slots a head on average, w of which must stay, the last layer gets w + (C - w) / β. The first gets as much more than
    the average as the last gets less, but no more than it has entries, in which case the last gets accordingly more.
    """
    layers, heads, _ = scores.shape
    mean = total / (layers * heads)
    fixed = int(scores[0, 0].isposinf().sum())
    free = max(0.0, mean - fixed)
    top = min(2 * free - free / beta, max(room(scores)) - fixed)
    step = 2 * (top - free) / max(1, layers - 1)
    counts = [min(mean, fixed) + top - layer * step for layer in range(layers)]
    return split(shares([count for count in counts for _ in range(heads)], total, room(scores)), heads)


METHODS = (
    Method(
        name="pyramidkv",
        summary="SnapKV's tokens, fewer of them the higher the layer",
        paper="PyramidKV, arXiv 2406.02069",
        score=score.pooled_window,
        allot=pyramid,
        sinks=0,
        cost="32 queries' attention",
        good="models whose upper layers attend to few tokens",
        bad="models whose upper layers need more",
    ),
)
