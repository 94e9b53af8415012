"""Attention states: parts merged are one softmax, a vote of p is p copies."""

from __future__ import annotations

import pytest
import torch

from attend.truth import COUNTS, GROUP, NEW, TAIL, expected, masks, randn, slots_in, slots_of
from keepkv.attend.dispatch import attend_slots, attend_tail
from keepkv.attend.states import exact, merge_states
from keepkv.slots.slots import Slots


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("tail", [1, 7, 130])
def test_joined_parts_are_one_softmax(rows: int, tail: int) -> None:
    query, slots = randn(2, 3, rows, 16), slots_of(COUNTS)
    keys, values = randn(2, 3, tail, 16, seed=2), randn(2, 3, tail, 24, seed=3)
    visible = torch.rand(2, 1, rows, tail, generator=torch.Generator().manual_seed(4)) < 0.5
    visible[..., -1] = True  # a head without slots must see something
    got, log_mass = merge_states(attend_slots(query, slots, 0.3), attend_tail(query, keys, values, visible, 0.3))
    torch.testing.assert_close(got, expected(query, slots, keys, values, visible, 0.3), rtol=1e-12, atol=1e-12)
    assert log_mass.isfinite().all()


def test_rows_that_see_no_tail_get_the_slots_alone() -> None:
    query, slots = randn(1, 2, 5, 16), slots_of([9, 4])
    keys, values = randn(1, 2, 3, 16, seed=2), randn(1, 2, 3, 24, seed=3)
    alone = attend_slots(query, slots, 1.0)
    nothing = attend_tail(query, keys, values, torch.zeros(1, 1, 5, 3, dtype=torch.bool), 1.0)
    assert torch.equal(merge_states(alone, nothing)[0], alone[0])
    assert merge_states(nothing, nothing)[0].isfinite().all()


@pytest.mark.parametrize("offset", [-50.0, 0.0, 50.0])
def test_a_vote_of_p_is_p_copies(offset: float) -> None:
    query, keys, values = randn(1, 1, 6, 16), randn(5, 16, seed=2), randn(5, 8, seed=3)
    votes = torch.tensor([1, 2, 7, 1, 40])
    repeated = torch.arange(5).repeat_interleave(votes)
    bias = votes.double().log() + offset
    got = exact(query, keys, values, bias, 1.0)
    copies = exact(query, keys[repeated], values[repeated], torch.full((1, 51), offset, dtype=torch.float64), 1.0)
    for ours, theirs in zip(got, copies, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_blocks_apart_and_together_are_the_same() -> None:
    """Composition: joining two blocks' attention equals attention over their concatenation."""
    query, first, second = randn(1, 1, 4, 16), slots_of([30], seed=5), slots_of([70], seed=6)
    together = Slots(*map(torch.cat, zip(first.tensors, second.tensors, strict=True)), offsets=(0, 100))
    apart = merge_states(attend_slots(query, first, 0.25), attend_slots(query, second, 0.25))
    for ours, theirs in zip(apart, attend_slots(query, together, 0.25), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_eager(dtype: torch.dtype) -> None:
    """Error against float64 truth at most that of plain attention in the same dtype, with some room for chance."""
    query, slots = randn(2, 3, 4, 64, dtype=dtype), slots_of(COUNTS, 64, 64, dtype)
    keys, values = randn(2, 3, 33, 64, dtype=dtype, seed=2), randn(2, 3, 33, 64, dtype=dtype, seed=3)
    truth = expected(query, slots, keys, values, torch.ones(2, 1, 4, 33, dtype=torch.bool), 0.125)
    got = merge_states(attend_slots(query, slots, 0.125), attend_tail(query, keys, values, None, 0.125))[0]
    eager = torch.empty_like(truth)
    for head in range(6):
        lo, hi = slots.offsets[head : head + 2]
        k, v = (
            torch.cat([slots.keys[lo:hi], keys.flatten(0, 1)[head]]),
            torch.cat([slots.values[lo:hi], values.flatten(0, 1)[head]]),
        )
        bias = torch.cat([slots.bias[lo:hi], torch.zeros(33)]).to(dtype)
        eager.view(6, 4, 64)[head] = exact(query.flatten(0, 1)[head], k, v, bias, 0.125)[0].double()
    assert (got.double() - truth).abs().max() <= 1.5 * (eager - truth).abs().max() + 1e-6


@pytest.mark.parametrize("kind", masks(NEW, TAIL))
def test_log_sum_exps_are_those_of_float64(kind: str) -> None:
    """The kernel gives 0 for rows that see nothing, and may give it for others: both must come out right."""
    query, visible = randn(2, 3, GROUP * NEW, 16, dtype=torch.float32), masks(NEW, TAIL)[kind]
    keys, values = randn(2, 3, TAIL, 16, dtype=torch.float32, seed=2), randn(2, 3, TAIL, 16, dtype=torch.float32, seed=3)
    query[:, :, 0] = 0
    slots = slots_of([1, 1, 2, 5, 0, 600], 16, 16, torch.float32)
    slots.bias[:2] = torch.tensor([-torch.inf, 0.0])  # nothing to see; and a log-sum-exp of 0
    truth = attend_tail(query.double(), keys.double(), values.double(), visible, 0.3, "eager")
    tail = attend_tail(query, keys, values, visible, 0.3, "sdpa")
    compact = attend_slots(query, slots, 0.3, "sdpa")
    for ours, exactly in ((tail, truth), (compact, attend_slots(query.double(), slots_in(slots, torch.float64), 0.3))):
        for got, wanted in zip(ours, exactly, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert compact[1][0, 0].eq(-torch.inf).all()
    assert compact[1][0, 1, 0] == 0
