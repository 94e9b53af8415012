"""Votes in additional dimensions of the keys."""

from __future__ import annotations

import pytest
import torch

from attend.truth import COUNTS, randn, slots_in, slots_of
from keepkv.attend import bias_in_keys
from keepkv.attend.dispatch import attend, attend_slots
from keepkv.slots.slots import Slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.125, 128**-0.5, 1.0])
def test_votes_in_spare_dimensions_are_votes(dtype: torch.dtype, scale: float) -> None:
    """Also large ones in low precision, where one number of the keys' dtype would be off by a tenth."""
    query, slots = randn(2, 3, 5, 16, dtype=dtype), slots_of(COUNTS, 16, 16, dtype)
    slots.bias.mul_(2).sub_(3)
    slots.bias[40:50] = -torch.inf
    wide = bias_in_keys.widen(slots, scale)
    for ours, truth in zip(
        attend_slots(query, wide, scale), attend_slots(query.double(), slots_in(slots, torch.float64), scale), strict=True
    ):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-5)
    keys, values = randn(2, 3, 4, 16, dtype=dtype, seed=2), randn(2, 3, 4, 16, dtype=dtype, seed=3)
    torch.testing.assert_close(
        attend(query, wide, keys, values, None, scale), attend(query, slots, keys, values, None, scale), rtol=1e-5, atol=2e-5
    )
    assert torch.equal(wide.keys[:], slots.keys)
    assert wide.keys.tensors[0].nbytes == slots.keys.nbytes * 24 // 16
    both = Slots.cat([wide.rows([1], 3), wide.rows([0], 3)])
    assert torch.equal(attend_slots(query, both, scale)[0][1], attend_slots(query.flip(0), wide, scale)[0][0])
