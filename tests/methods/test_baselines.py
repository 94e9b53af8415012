"""The baselines."""

from __future__ import annotations

import torch

from helpers import observation
from keepkv.methods import baselines


def test_chance_is_repeatable_and_differs_by_layer_and_seed() -> None:
    first, again = baselines.chance(observation(seed=3)), baselines.chance(observation(seed=3))
    assert torch.equal(first, again)
    assert not torch.equal(first, baselines.chance(observation(seed=4)))
    assert not torch.equal(first, baselines.chance(observation(seed=3, layer=1)))
