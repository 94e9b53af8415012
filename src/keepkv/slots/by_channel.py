"""QuantizedByChannel: keys as integers of 8, 4 or 2 bits, with a step and an offset for each channel of a tile of slots.

Some channels of a model's keys are much larger than others, or lie around a large bias, for every token alike. Within a channel
they vary little: so a channel's numbers share a grid (KIVI, arXiv 2402.02750, section 3). `docs/theory.md 9.2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from keepkv.ops.dtypes import wide
from keepkv.slots.packed import pack, packed_width, unpack
from keepkv.slots.vectors import Stored

TILE = 64  # slots of a head that share their grids


@dataclass(frozen=True)
class QuantizedByChannel(Stored):
    """Vectors x = s c + z, with a grid (s, z) for each channel of a tile of at most 64 neighboring slots of one head.

        z = min x      s = (max x - z) / m, rounded to bfloat16      c = round((x - z) / s)      m = 2^bits - 1

    So no number is wrong by more than s/2, except that the rounding of s may add (max x - z) / 128 to the largest. What was
    read and is stored again in the same tiles stays what it is, in float32 and better. `docs/theory.md 9.2`.

    Args:
        codes: c, uint8 [n, ⌈d·bits/8⌉], see `pack`.
        steps: s, bfloat16 [tiles, d].
        lows: z, [tiles, d], in the dtype of the vectors.
        starts: tiles + 1 integers: tile t has the vectors starts[t] to starts[t + 1] - 1.
        bits: Of an integer.
        size: d.
    """

    codes: Tensor
    steps: Tensor
    lows: Tensor
    starts: tuple[int, ...]
    bits: int
    size: int

    @staticmethod
    def of(vectors: Tensor, bits: int, counts: Sequence[int]) -> QuantizedByChannel:
        """Vectors [n, d] of heads of so many slots, rounded. Tiles begin anew with every head."""
        starts = tile_starts(counts)
        size, tiles, top = vectors.shape[1], len(starts) - 1, 2**bits - 1
        x = vectors.to(wide(vectors.dtype))
        tile = _tile_of(starts, x.device)
        index = tile[:, None].expand(-1, size)
        low = x.new_full((tiles, size), torch.inf).scatter_reduce_(0, index, x, "amin")
        high = x.new_full((tiles, size), -torch.inf).scatter_reduce_(0, index, x, "amax")
        extent = high - low
        steps = (extent / top).bfloat16()
        # Whatever way it is rounded, the largest number gets the largest code, so that what was read has the same step again.
        steps = torch.where(extent / steps.to(x.dtype) < top - 0.49, steps.nextafter(torch.zeros_like(steps)), steps)
        step = steps.to(x.dtype)
        codes = (x - low[tile]) / step.masked_fill(step == 0, 1)[tile]
        packed = pack(codes.round_().clamp_(0, top).to(torch.uint8), bits)
        return QuantizedByChannel(packed, steps, low.to(vectors.dtype), starts, bits, size)

    @staticmethod
    def code_bytes(size: int, bits: int) -> int:
        """Bytes of one vector's integers."""
        return packed_width(size, bits)

    @staticmethod
    def tile_bytes(size: int, element: int) -> int:
        """Bytes of a tile's grids, where a number of the vectors has `element` bytes."""
        return (2 + element) * size

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.size

    @property
    def dtype(self) -> torch.dtype:
        return self.lows.dtype

    @property
    def tensors(self) -> list[Tensor]:
        return [self.codes, self.steps, self.lows]

    def unrotated(self) -> Tensor:
        dtype = wide(self.dtype)
        codes = unpack(self.codes, self.bits, self.size).to(dtype)
        counts = torch.tensor([hi - lo for lo, hi in pairwise(self.starts)], dtype=torch.int64, device=self.device)
        steps, lows = (x.to(dtype).repeat_interleave(counts, 0, output_size=len(codes)) for x in (self.steps, self.lows))
        return lows.addcmul_(codes, steps).to(self.dtype)

    def cut(self, lo: int, hi: int) -> QuantizedByChannel:
        hi = max(lo, hi)
        tiles = [t for t, (first, last) in enumerate(pairwise(self.starts)) if first < hi and last > lo]
        some = slice(tiles[0], tiles[-1] + 1) if tiles else slice(0, 0)
        bounds = [min(max(bound, lo), hi) - lo for bound in self.starts[some.start : some.stop + 1]]
        starts = tuple(bounds) if tiles else (0,)
        return replace(self, codes=self.codes[lo:hi], steps=self.steps[some], lows=self.lows[some], starts=starts)

    def to(self, device: torch.device) -> QuantizedByChannel:
        return replace(self, codes=self.codes.to(device), steps=self.steps.to(device), lows=self.lows.to(device))

    @classmethod
    def cat(cls, parts: Sequence[QuantizedByChannel]) -> QuantizedByChannel:
        codes, steps, lows = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "steps", "lows"))
        starts = [0]
        for part in parts:
            before = starts[-1]
            starts += [before + start for start in part.starts[1:]]
        return replace(parts[0], codes=codes, steps=steps, lows=lows, starts=tuple(starts))


def tile_starts(counts: Sequence[int]) -> tuple[int, ...]:
    """Where the tiles of heads of so many slots begin, and the number of all slots.

    Example:
        >>> tile_starts([70, 0, 3])
        (0, 64, 70, 73)
    """
    starts = [0]
    for count in counts:
        first = starts[-1]
        starts += [min(end, first + count) for end in range(first + TILE, first + count + TILE, TILE)]
    return tuple(starts)


def _tile_of(starts: Sequence[int], device: torch.device) -> Tensor:
    """The tile of every vector, int64 [n]."""
    counts = torch.tensor([hi - lo for lo, hi in pairwise(starts)], dtype=torch.int64)
    return torch.arange(len(counts)).repeat_interleave(counts).to(device)
