"""Shared: vectors of two layers held as one set of directions and two sets of norms. MiniCache, arXiv 2405.14366."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.slots.vectors import Stored


class Block(NamedTuple):
    """Vectors x_i = norm_i e_j, j = place_i: directions [m, d], which other blocks may hold too, places int32 and norms [n]."""

    directions: Tensor
    places: Tensor
    norms: Tensor

    def read(self) -> Tensor:
        rows = self.directions[self.places]
        return (rows * self.norms[:, None]).to(rows.dtype)


@dataclass(frozen=True)
class Shared(Stored):
    """A stack of n vectors [n, d], block after block."""

    blocks: tuple[Block, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(len(block.places) for block in self.blocks), self.blocks[0].directions.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].directions.dtype

    @property
    def tensors(self) -> list[Tensor]:
        return [x for block in self.blocks for x in block]

    def unrotated(self) -> Tensor:
        return torch.cat([block.read() for block in self.blocks])

    def cut(self, lo: int, hi: int) -> Shared:
        parts, start = [], 0
        for directions, places, norms in self.blocks:
            first, last = max(0, lo - start), min(len(places), hi - start)
            start += len(places)
            if first < last:
                parts.append(Block(directions, places[first:last], norms[first:last]))
        return Shared(
            tuple(parts) or (self.blocks[0]._replace(places=self.blocks[0].places[:0], norms=self.blocks[0].norms[:0]),)
        )

    @classmethod
    def cat(cls, parts: Sequence[Shared]) -> Shared:
        return Shared(tuple(block for part in parts for block in part.blocks))
