"""CaM: dropped values are passed on by chance."""

from __future__ import annotations

from dataclasses import replace

import torch

from helpers import randn64
from keepkv.methods import cam
from keepkv.types import Choice
from methods.observed import seen


def test_cam_passes_values_on_one_by_one() -> None:
    values, mass = randn64(30, 4), torch.rand(30, dtype=torch.float64)
    kept, chance, present = torch.tensor([0, 1, 25, 26, 27, 28, 29]), torch.rand(30).double(), torch.ones(30, dtype=torch.bool)
    got = cam.spread_values(values, kept, mass, chance, present, spread=4)
    naive = values.clone()
    for token in range(2, 25):
        if chance[token] < min(1.0, float(mass[token] / mass[token + 1 : token + 5].mean())):
            for later in range(token + 1, token + 5):
                naive[later] += naive[token] / 4
    torch.testing.assert_close(got, naive)
    assert torch.equal(got[29], values[29])  # four from the last dropped one reach 28
    assert torch.equal(cam.spread_values(values, kept, mass * 0, chance, present), values)  # no attention, no chance


def test_cam_keeps_keys_and_is_repeatable() -> None:
    observation = seen(column_mass=torch.rand(2, 60))
    choices = [Choice(torch.cat([torch.arange(2), torch.arange(40, 60)]))] * 2
    first, again = cam.followers(observation, choices), cam.followers(observation, choices)
    other = cam.followers(replace(observation, seed=1), choices)
    for head in range(2):
        assert torch.equal(first[head].keys, observation.keys[head, choices[head].kept])
        assert torch.equal(first[head].values, again[head].values)
    assert not torch.equal(first[0].values, other[0].values)
