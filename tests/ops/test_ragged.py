"""Heads of different lengths side by side, and in which groups they are worked on."""

from __future__ import annotations

import torch

from helpers import randn
from keepkv.ops.ragged import Ragged, groups


def test_lists_are_filled_up_and_picked() -> None:
    slots = Ragged.of([torch.tensor([1, 4]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 2, 3])])
    assert slots.real.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    x = randn(3, 5, 2, seed=0)
    assert torch.equal(slots.pick(x)[0, :2], x[0, [1, 4]])
    assert torch.equal(slots.pick(x[..., 0])[2], x[2, [0, 2, 3], 0])


def test_groups_cover_every_head_once_and_keep_to_the_memory() -> None:
    assert groups(3, torch.device("cpu"), 10) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    many = groups(10, torch.device("meta"), 1 << 26)
    assert [head for of in many for head in range(of.start, of.stop)] == [*range(10)]
    assert max(of.stop - of.start for of in many) * (1 << 26) <= 1 << 28
