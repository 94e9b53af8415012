"""PyramidInfer: the newest fifth of the queries, weighted."""

from __future__ import annotations

import torch

from keepkv.methods import pyramidinfer
from methods.observed import seen, shares


def test_pyramidinfer_weighs_the_newest_fifth_of_queries() -> None:
    observation = seen()
    share = shares(observation, 12)  # a fifth of 60
    wanted = (share * torch.linspace(1, 1.2, 12).double()[:, None]).sum(2).mean((0, 1))
    for head in pyramidinfer.newest_fifth(observation):
        torch.testing.assert_close(head.double(), wanted, rtol=1e-4, atol=1e-6)
