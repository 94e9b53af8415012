"""Vectors stored as integers with a step each: what is read, and what it takes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from attend.truth import randn
from keepkv.cache.report import held_bytes
from keepkv.slots.by_vector import QuantizedByVector, hadamard

SIZES = [64, 96, 24, 7, 1]


@pytest.mark.parametrize("size", SIZES)
def test_the_turn_is_orthogonal_and_spreads_every_channel(size: int) -> None:
    turn = hadamard(size, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(turn @ turn.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14)
    block = size & -size
    torch.testing.assert_close(turn.abs().amax(), torch.tensor(block**-0.5, dtype=torch.float64))
    assert (turn != 0).sum() == size * block


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("level", [1e-20, 1.0, 1e20])
def test_no_number_is_wrong_by_more_than_its_bound(bits: int, size: int, level: float) -> None:
    """In the turned space: half a step, and for the largest what rounding the step takes off."""
    vectors = randn(200, size) * level
    vectors[3] = 0
    vectors[4, 1:] = 0  # an outlier
    stack = QuantizedByVector.of(vectors, bits)
    turn = hadamard(size, torch.float64, vectors.device)
    wrong, largest = ((stack[:] - vectors) @ turn.T).abs(), (vectors @ turn.T).abs().amax(1, keepdim=True)
    step = 2 * largest / (2**bits - 1)
    assert (wrong <= step / 2 * (1 + 2**-7) + largest / 512).all()
    assert torch.equal(stack[3:4], torch.zeros(1, size, dtype=torch.float64))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", SIZES)
def test_it_stores_what_it_says(bits: int, size: int) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        stack = QuantizedByVector.of(randn(100, size, dtype=dtype), bits)
        assert stack[:].dtype == stack.dtype == dtype
        assert held_bytes(stack.tensors) == 100 * QuantizedByVector.vector_bytes(size, bits)
        assert QuantizedByVector.vector_bytes(size, bits) == -(-size * bits // 8) + 2


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", SIZES)
def test_what_was_read_is_stored_as_it_was(bits: int, size: int) -> None:
    """So that an entry that many folds leave alone does not wander."""
    for dtype in (torch.float32, torch.float64):
        once = QuantizedByVector.of(randn(500, size, dtype=dtype), bits)
        again = QuantizedByVector.of(once[:], bits)
        assert all(map(torch.equal, once.tensors, again.tensors))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [64, 7])
def test_cutting_and_joining_are_those_of_tensors(bits: int, size: int) -> None:
    stack = QuantizedByVector.of(randn(50, size), bits)
    plain, index = stack[:], torch.tensor([[3, 0], [49, 3]])
    assert stack.shape == plain.shape
    assert len(stack) == 50
    close = partial(torch.testing.assert_close, rtol=1e-13, atol=1e-13)  # matrix products round by their shape
    close(stack[index], plain[index])
    for lo, hi in ((0, 50), (7, 19), (50, 50)):
        close(stack[lo:hi], plain[lo:hi])
        assert held_bytes(stack.cut(lo, hi).tensors) == held_bytes(stack.tensors)  # nothing is copied
    joined = QuantizedByVector.cat([stack.cut(40, 50), stack.cut(0, 3)])
    close(joined[:], torch.cat([plain[40:], plain[:3]]))


def test_two_bits_use_all_four_levels_evenly() -> None:
    """A step for normal numbers: mean squared error .119 of the variance (Max 1960), not .3 as with the largest number."""
    vectors = randn(4000, 64)
    stack = QuantizedByVector.of(vectors, 2)
    lost = float((stack[:] - vectors).square().mean() / vectors.square().mean())
    assert lost == pytest.approx(0.119, abs=0.01)
