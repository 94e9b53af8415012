"""Slots: the compact part of one layer, ragged and flat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from keepkv.slots import vectors
from keepkv.slots.by_channel import TILE
from keepkv.slots.vectors import Stack

BESIDE = 8  # bytes of a slot beside its key and value: its bias and its position


@dataclass(frozen=True)
class Slots:
    """The compact part of one layer, ragged and flat: row b and KV head h own offsets[b*H+h] : offsets[b*H+h+1].

    Args:
        keys: [total, d]. keys[lo:hi] is a tensor in the model's dtype, also where keys are quantized or two layers share them.
        values: [total, d_v], likewise.
        bias: [total] float32, the logarithm of each slot's vote, which is added to its logit. `docs/theory.md 1.2`.
        positions: [total] int32, the token that each slot's key comes from.
        offsets: rows*H + 1 integers, the first 0, the last `total`.
    """

    keys: Stack
    values: Stack
    bias: Tensor
    positions: Tensor
    offsets: tuple[int, ...]

    @property
    def counts(self) -> list[int]:
        """Slots of every (row, KV head), rows outermost."""
        return [hi - lo for lo, hi in zip(self.offsets, self.offsets[1:], strict=False)]

    @property
    def tensors(self) -> list[Tensor]:
        """All that is held, to count its bytes."""
        return [*vectors.tensors(self.keys), *vectors.tensors(self.values), self.bias, self.positions]

    def to(self, device: torch.device) -> Slots:
        """On another device. Vectors that layers share are plain there."""
        return replace(
            self,
            keys=self.keys.to(device),
            values=self.values.to(device),
            bias=self.bias.to(device),
            positions=self.positions.to(device),
        )

    def read(self) -> Slots:
        """With keys and values as plain tensors. It returns itself where they are."""
        plain = isinstance(self.keys, Tensor) and isinstance(self.values, Tensor)
        return self if plain else replace(self, keys=self.keys[:], values=self.values[:])

    def unrotated(self) -> Slots:
        """With plain tensors for keys and values, still in the rotated basis where the format has one: see `rotations`."""
        keys, values = vectors.unrotated(self.keys), vectors.unrotated(self.values)
        return self if keys is self.keys and values is self.values else replace(self, keys=keys, values=values)

    @property
    def rotations(self) -> tuple[Tensor | None, Tensor | None]:
        """The H of the keys and of the values, see `Stored.rotation`."""
        return vectors.rotation(self.keys), vectors.rotation(self.values)

    @cached_property
    def per_head(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Views of every (row, KV head): keys [n, d], values [n, d_v], bias [n]. Made once, for slots that were `read`."""
        return list(zip(*(torch.split(x, self.counts) for x in (self.keys[:], self.values[:], self.bias)), strict=True))

    @cached_property
    def bounds(self) -> Tensor:
        """`offsets` as int64 beside the slots, for kernels."""
        return torch.tensor(self.offsets, dtype=torch.int64, device=self.keys.device)

    @cached_property
    def first_tiles(self) -> Tensor:
        """The first tile of every (row, KV head) as int64 beside the slots, for kernels, where keys are stored by channel."""
        tiles = [0, *accumulate(-(-count // TILE) for count in self.counts)]
        return torch.tensor(tiles, dtype=torch.int64, device=self.keys.device)

    @staticmethod
    def cat(parts: Sequence[Slots]) -> Slots:
        """Heads, or rows, of one layer, one after the other."""
        counts = [n for part in parts for n in part.counts]
        return Slots(
            keys=vectors.cat([part.keys for part in parts]),
            values=vectors.cat([part.values for part in parts]),
            bias=torch.cat([part.bias for part in parts]),
            positions=torch.cat([part.positions for part in parts]),
            offsets=(0, *accumulate(counts)),
        )

    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys [H, n, d], values [H, n, d_v], bias and positions [H, n] of one row of the batch.

        Shorter heads are filled up in front, with zeros, a bias of -inf and a position of -1.
        """
        most = max(self.counts, default=0)
        index = torch.full((len(self.counts), most), -1, device=self.bias.device)
        for head, (lo, hi) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            index[head, most - (hi - lo) :] = torch.arange(lo, hi, device=index.device)
        filled = index < 0
        index = index.clamp(min=0)
        return (
            self.keys[index].masked_fill_(filled[..., None], 0),
            self.values[index].masked_fill_(filled[..., None], 0),
            self.bias[index].masked_fill_(filled, -torch.inf),
            self.positions[index].long().masked_fill_(filled, -1),
        )

    def newest_off(self, count: int) -> Slots:
        """Without the last `count` slots of every head."""
        if not count:
            return self
        return Slots.cat([self.between(lo, hi - count) for lo, hi in zip(self.offsets, self.offsets[1:], strict=False)])

    def rows(self, indices: Sequence[int], heads: int) -> Slots:
        """The given rows of the batch, in that order, copied, as beam search and batch selection need. heads = H."""
        return Slots.cat([self._part(row * heads, (row + 1) * heads) for row in indices])

    def _part(self, first: int, last: int) -> Slots:
        """Heads first to last - 1."""
        bounds = self.offsets[first : last + 1]
        whole = self.between(bounds[0], bounds[-1])
        return replace(whole, offsets=tuple(bound - bounds[0] for bound in bounds))

    def between(self, lo: int, hi: int) -> Slots:
        """Slots lo to hi - 1, as those of one head."""
        keys, values = vectors.cut(self.keys, lo, hi), vectors.cut(self.values, lo, hi)
        return Slots(keys, values, self.bias[lo:hi], self.positions[lo:hi], (0, hi - lo))
