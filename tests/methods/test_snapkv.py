"""SnapKV: the window's pooled mean share."""

from __future__ import annotations

import torch

from keepkv import score
from methods.observed import seen, shares


def test_snapkv_pools_the_windows_mean_share_and_keeps_the_window() -> None:
    observation = seen()
    got, mean = score.pooled_window(observation), shares(observation, 32).mean((1, 2))[:, :28]
    for place in (0, 5, 13, 27):
        near = mean[:, max(0, place - 2) : place + 3]
        torch.testing.assert_close(got[:, place].double(), near.sum(1) / 5, rtol=1e-4, atol=1e-7)
    assert got[:, 28:].isposinf().all()
