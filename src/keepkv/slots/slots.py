"""Slots: the compact part of one layer, ragged and flat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from keepkv.slots import vectors
from keepkv.slots.vectors import Stack

BESIDE = 8  # bytes of a slot beside its key and value: its bias and its position


@dataclass(frozen=True)
class Slots:
    """The compact part of one layer, ragged and flat: row b and KV head h own offsets[b*H+h] : offsets[b*H+h+1].

    keys [total, d] and values [total, d_v], keys[lo:hi] a tensor in the model's dtype also where two layers share them or they
    are quantized; bias [total] float32, the log of each slot's vote, added to its logit; positions [total] int32, the token
    each slot's key comes from; offsets, rows*H + 1 integers.
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
        return [*vectors.tensors(self.keys), *vectors.tensors(self.values), self.bias, self.positions]

    def to(self, device: torch.device) -> Slots:
        """On another device; vectors that layers share are plain there."""
        keys, values = self.keys.to(device), self.values.to(device)
        return replace(self, keys=keys, values=values, bias=self.bias.to(device), positions=self.positions.to(device))

    def read(self) -> Slots:
        """With keys and values as plain tensors: itself, unless they are stored in another way."""
        plain = isinstance(self.keys, Tensor) and isinstance(self.values, Tensor)
        return self if plain else replace(self, keys=self.keys[:], values=self.values[:])

    def unrotated(self) -> Slots:
        """With plain tensors for keys and values, not rotated where the format rotates: see `rotations`."""
        keys, values = vectors.unrotated(self.keys), vectors.unrotated(self.values)
        return self if keys is self.keys and values is self.values else replace(self, keys=keys, values=values)

    @property
    def rotations(self) -> tuple[Tensor | None, Tensor | None]:
        """The H of keys and of values: see `Stored.rotation`."""
        return vectors.rotation(self.keys), vectors.rotation(self.values)

    @cached_property
    def per_head(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Views of every (row, KV head): keys [n, d], values [n, d_v], bias [n]. Made once; of slots that were `read`."""
        return list(zip(*(torch.split(x, self.counts) for x in (self.keys[:], self.values[:], self.bias)), strict=True))

    @cached_property
    def bounds(self) -> Tensor:
        """`offsets` as int64 beside the slots, for kernels."""
        return torch.tensor(self.offsets, dtype=torch.int64, device=self.keys.device)

    @staticmethod
    def cat(parts: Sequence[Slots]) -> Slots:
        """Stacks heads, or rows, of one layer: the parts stand one after the other."""
        counts = [n for part in parts for n in part.counts]
        return Slots(
            vectors.cat([part.keys for part in parts]), vectors.cat([part.values for part in parts]),
            torch.cat([part.bias for part in parts]), torch.cat([part.positions for part in parts]), (0, *accumulate(counts)),
        )  # fmt: skip

    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys [H, n, d], values, bias, positions [H, n] of one row, the shorter heads filled up in front: bias -inf there."""
        most = max(self.counts, default=0)
        index = torch.full((len(self.counts), most), -1, device=self.bias.device)
        for head, (lo, hi) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            index[head, most - (hi - lo) :] = torch.arange(lo, hi, device=index.device)
        real, index = index >= 0, index.clamp(min=0)
        keys, values, bias, positions = self.keys[index], self.values[index], self.bias[index], self.positions[index]
        away = ~real[..., None]
        return (
            keys.masked_fill_(away, 0), values.masked_fill_(away, 0), bias.masked_fill_(~real, -torch.inf),
            positions.long().masked_fill_(~real, -1),
        )  # fmt: skip

    def newest_off(self, count: int) -> Slots:
        """Without the last `count` slots of every head."""
        if not count:
            return self
        return Slots.cat([self._between(lo, hi - count) for lo, hi in zip(self.offsets, self.offsets[1:], strict=False)])

    def rows(self, indices: Sequence[int], heads: int) -> Slots:
        """The given batch rows, in that order, copied: what beam search and batch selection need. heads = H."""
        return Slots.cat([self._part(row * heads, (row + 1) * heads) for row in indices])

    def _part(self, first: int, last: int) -> Slots:
        bounds = self.offsets[first : last + 1]
        whole = self._between(bounds[0], bounds[-1])
        return replace(whole, offsets=tuple(bound - bounds[0] for bound in bounds))

    def _between(self, lo: int, hi: int) -> Slots:
        """Slots lo to hi, as those of one head."""
        keys, values = vectors.cut(self.keys, lo, hi), vectors.cut(self.values, lo, hi)
        return Slots(keys, values, self.bias[lo:hi], self.positions[lo:hi], (0, hi - lo))
