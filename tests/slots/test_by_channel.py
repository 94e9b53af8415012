"""Keys stored as integers with a grid for each channel of a tile: what is read, and what it takes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from attend.truth import randn
from keepkv.cache.report import held_bytes
from keepkv.slots.by_channel import TILE, QuantizedByChannel, tile_starts

BITS = [8, 4, 2]
COUNTS = [70, 0, 3, 64, 129, 1]


def stored(bits: int, size: int = 24, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, QuantizedByChannel]:
    vectors = randn(sum(COUNTS), size, dtype=dtype)
    return vectors, QuantizedByChannel.of(vectors, bits, COUNTS)


def test_tiles_begin_anew_with_every_head_and_are_full_but_the_last() -> None:
    starts = tile_starts(COUNTS)
    assert starts == (0, 64, 70, 73, 137, 201, 265, 266, 267)
    assert TILE == 64
    assert tile_starts([]) == tile_starts([0, 0]) == (0,)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("level", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("bias", [0.0, 1000.0])
def test_no_number_is_wrong_by_more_than_its_bound(bits: int, level: float, bias: float) -> None:
    """Half a step, and what rounding the step takes off; tile by tile and channel by channel, whatever the others are like."""
    vectors = randn(sum(COUNTS), 7)
    vectors[:, 3] += bias
    vectors[:, 5] = 2.0
    vectors = vectors * level
    stack = QuantizedByChannel.of(vectors, bits, COUNTS)
    for lo, hi in zip(stack.starts, stack.starts[1:], strict=False):
        tile = vectors[lo:hi]
        extent = tile.amax(0) - tile.amin(0)
        wrong = (stack[lo:hi] - tile).abs()
        rounding = 1e-15 * tile.abs().amax(0)
        assert (wrong <= extent / (2**bits - 1) / 2 * (1 + 2**-7) + extent / 128 + rounding).all()
    assert torch.equal(stack[:][:, 5], vectors[:, 5])  # a constant channel is exact


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [64, 7, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_it_stores_what_it_says(bits: int, size: int, dtype: torch.dtype) -> None:
    _, stack = stored(bits, size, dtype)
    assert stack[:].dtype == stack.dtype == dtype
    tiles = len(stack.starts) - 1
    codes = sum(COUNTS) * QuantizedByChannel.code_bytes(size, bits)
    assert held_bytes(stack.tensors) == codes + tiles * QuantizedByChannel.tile_bytes(size, dtype.itemsize)
    assert QuantizedByChannel.code_bytes(size, bits) == -(-size * bits // 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_read_is_stored_as_it_was(bits: int, dtype: torch.dtype) -> None:
    _, once = stored(bits, 64, dtype)
    again = QuantizedByChannel.of(once[:], bits, COUNTS)
    assert all(map(torch.equal, once.tensors, again.tensors))


@pytest.mark.parametrize("bits", BITS)
def test_cutting_and_joining_are_those_of_tensors(bits: int) -> None:
    _, stack = stored(bits)
    plain, index = stack[:], torch.tensor([[3, 0], [200, 3]])
    assert stack.shape == plain.shape
    assert torch.equal(stack[index], plain[index])
    for lo, hi in ((0, 267), (7, 19), (60, 140), (64, 70), (70, 70), (267, 267), (9, 3)):
        assert torch.equal(stack[lo:hi], plain[lo:hi])
        assert stack.cut(lo, max(lo, hi)).codes.untyped_storage().data_ptr() == stack.codes.untyped_storage().data_ptr()
    joined = QuantizedByChannel.cat([stack.cut(60, 140), stack.cut(0, 3), stack.cut(5, 5), stack])
    assert torch.equal(joined[:], torch.cat([plain[60:140], plain[:3], plain]))
    assert torch.equal(joined.cut(78, 90)[:], torch.cat([plain[138:140], plain[:3], plain[:7]]))
    close = partial(torch.testing.assert_close, rtol=0, atol=0)
    close(stack.to(torch.device("cpu"))[:], plain)


@pytest.mark.parametrize("bits", BITS)
def test_channels_with_a_bias_lose_nothing_of_the_others(bits: int) -> None:
    """Keys as Qwen's: a large bias in a few channels. By vector the other channels are lost, by channel nothing is."""
    from keepkv.slots.by_vector import QuantizedByVector

    vectors = randn(256, 64)
    vectors[:, :3] += 100
    by_channel = QuantizedByChannel.of(vectors, bits, [256])[:] - vectors
    without_bias = QuantizedByChannel.of(vectors - vectors.mean(0), bits, [256])[:] - (vectors - vectors.mean(0))
    assert by_channel.square().mean() < 1.05 * without_bias.square().mean()
    assert by_channel.square().mean() < 0.1 * (QuantizedByVector.of(vectors, bits)[:] - vectors).square().mean()
