"""Attention over compact part and tail against the plain softmax in float64."""

from __future__ import annotations

import pytest
import torch

from keepkv.attention import attend_slots, attend_tail, exact, join
from keepkv.types import Slots

COUNTS = [1, 15, 63, 255, 0, 1000]  # very different lengths in one layer


def slots_of(
    counts: list[int], size: int = 16, value_size: int = 24, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Slots:
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    offsets = tuple(torch.tensor([0, *counts]).cumsum(0).tolist())
    return Slots(
        torch.randn(total, size, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(total, value_size, generator=generator, dtype=torch.float64).to(dtype),
        torch.rand(total, generator=generator) * 5,
        torch.arange(total, dtype=torch.int32),
        offsets,
    )


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expected(query, slots, tail_keys, tail_values, visible, scale):
    """Per head: one softmax over slots and visible tail tokens, in float64."""
    batch, heads, rows, _ = query.shape
    output = torch.empty(batch, heads, rows, slots.values.shape[1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            lo, hi = slots.offsets[b * heads + h : b * heads + h + 2]
            keys = torch.cat([slots.keys[lo:hi], tail_keys[b, h]]).double()
            values = torch.cat([slots.values[lo:hi], tail_values[b, h]]).double()
            bias = torch.zeros(rows, len(keys), dtype=torch.float64)
            bias[:, : hi - lo] = slots.bias[lo:hi]
            bias[:, hi - lo :].masked_fill_(~visible[b, 0], -torch.inf)
            output[b, h] = exact(query[b, h].double(), keys, values, bias, scale)[0]
    return output


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("tail", [1, 7, 130])
def test_joined_parts_are_one_softmax(rows: int, tail: int) -> None:
    query, slots = randn(2, 3, rows, 16), slots_of(COUNTS)
    keys, values = randn(2, 3, tail, 16, seed=2), randn(2, 3, tail, 24, seed=3)
    visible = torch.rand(2, 1, rows, tail, generator=torch.Generator().manual_seed(4)) < 0.5
    visible[..., -1] = True  # a head without slots must see something
    got, log_mass = join(attend_slots(query, slots, 0.3), attend_tail(query, keys, values, visible, 0.3))
    torch.testing.assert_close(got, expected(query, slots, keys, values, visible, 0.3), rtol=1e-12, atol=1e-12)
    assert log_mass.isfinite().all()


def test_tail_in_tiles_is_the_tail_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values = randn(2, 3, 50, 16), randn(2, 3, 40, 16, seed=2), randn(2, 3, 40, 8, seed=3)
    visible = torch.ones(50, 40, dtype=torch.bool).tril()[None, None]
    whole = attend_tail(query, keys, values, visible, 0.5)
    monkeypatch.setattr("keepkv.attention._TILE", 7 * 240)
    for tiled, at_once in zip(attend_tail(query, keys, values, visible, 0.5), whole, strict=True):
        torch.testing.assert_close(tiled, at_once, rtol=1e-13, atol=1e-13)


def test_rows_that_see_no_tail_get_the_slots_alone() -> None:
    query, slots = randn(1, 2, 5, 16), slots_of([9, 4])
    keys, values = randn(1, 2, 3, 16, seed=2), randn(1, 2, 3, 24, seed=3)
    alone = attend_slots(query, slots, 1.0)
    nothing = attend_tail(query, keys, values, torch.zeros(1, 1, 5, 3, dtype=torch.bool), 1.0)
    assert torch.equal(join(alone, nothing)[0], alone[0])
    assert join(nothing, nothing)[0].isfinite().all()


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
    apart = join(attend_slots(query, first, 0.25), attend_slots(query, second, 0.25))
    for ours, theirs in zip(apart, attend_slots(query, together, 0.25), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_eager(dtype: torch.dtype) -> None:
    """Error against float64 truth at most that of plain attention in the same dtype, with some room for chance."""
    query, slots = randn(2, 3, 4, 64, dtype=dtype), slots_of(COUNTS, 64, 64, dtype)
    keys, values = randn(2, 3, 33, 64, dtype=dtype, seed=2), randn(2, 3, 33, 64, dtype=dtype, seed=3)
    truth = expected(query, slots, keys, values, torch.ones(2, 1, 4, 33, dtype=torch.bool), 0.125)
    got = join(attend_slots(query, slots, 0.125), attend_tail(query, keys, values, None, 0.125))[0]
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


def test_rows_are_taken_whole() -> None:
    slots = slots_of([3, 1, 4, 1, 5, 9])
    taken = slots.rows([2, 0, 2], heads=2)
    assert taken.counts == [5, 9, 3, 1, 5, 9]
    assert torch.equal(taken.keys[:14], slots.keys[9:])
    assert torch.equal(taken.positions[14:18], slots.positions[:4])
