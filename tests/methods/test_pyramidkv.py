"""PyramidKV: budgets that fall from layer to layer."""

from __future__ import annotations

import pytest
import torch

from keepkv.methods import pyramidkv
from methods.observed import INF


def test_pyramid_budgets_fall_on_a_line_to_a_twentieth() -> None:
    scores = torch.rand(7, 2, 400)
    scores[..., -20:] = INF
    counts = [layer[0] for layer in pyramidkv.pyramid(scores, 7 * 2 * 100)]
    assert sum(counts) == 700
    assert counts[-1] == pytest.approx(20 + 80 / 20, abs=1)
    steps = torch.tensor(counts).diff()
    assert steps.max() <= 0
    assert steps.max() - steps.min() <= 2
    crowded = [layer[0] for layer in pyramidkv.pyramid(scores, 7 * 2 * 300)]  # the first layer cannot have twice the average
    assert crowded[0] == 400
    assert sum(crowded) == 2100
