"""Shared: vectors of two layers held as one set of directions and two sets of norms. MiniCache, arXiv 2405.14366."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Vectors x_i = norm_i e_j, j = place_i: directions [m, d], which other blocks may hold too, places int32 and norms [n]."""

    directions: Tensor
    places: Tensor
    norms: Tensor

    def read(self, which: slice) -> Tensor:
        rows = self.directions[self.places[which]]
        return (rows * self.norms[which, None]).to(rows.dtype)


@dataclass(frozen=True)
class Shared:
    """A stack of n vectors [n, d], block after block, that is read like a tensor, shared[lo:hi], and cut without being read."""

    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return sum(len(block.places) for block in self.blocks)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.blocks[0].directions.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].directions.dtype

    @property
    def device(self) -> torch.device:
        return self.blocks[0].directions.device

    @property
    def tensors(self) -> list[Tensor]:
        return [x for block in self.blocks for x in block]

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        if isinstance(which, slice):
            return torch.cat([block.read(slice(None)) for block in self.cut(*which.indices(len(self))[:2]).blocks])
        return self[:][which]

    def cut(self, lo: int, hi: int) -> Shared:
        """Vectors lo to hi. Nothing is copied."""
        parts, start = [], 0
        for directions, places, norms in self.blocks:
            first, last = max(0, lo - start), min(len(places), hi - start)
            start += len(places)
            if first < last:
                parts.append(Block(directions, places[first:last], norms[first:last]))
        return Shared(
            tuple(parts) or (self.blocks[0]._replace(places=self.blocks[0].places[:0], norms=self.blocks[0].norms[:0]),)
        )

    @staticmethod
    def cat(parts: Sequence[Shared]) -> Shared:
        return Shared(tuple(block for part in parts for block in part.blocks))
