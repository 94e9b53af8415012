"""Shared: vectors of two layers stored as one set of directions and two sets of norms. `docs/theory.md 8.5`.

MiniCache, arXiv 2405.14366.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.slots.vectors import Stored


class Block(NamedTuple):
    """Vectors x_i = norm_i e_j, where j = place_i.

    Attributes:
        directions: e, [m, d]; other blocks may hold the same tensor.
        places: [n] int32.
        norms: [n].
    """

    directions: Tensor
    places: Tensor
    norms: Tensor

    def read(self) -> Tensor:
        """The vectors, [n, d]."""
        directions = self.directions[self.places]
        return (directions * self.norms[:, None]).to(directions.dtype)


@dataclass(frozen=True)
class Shared(Stored):
    """A stack of n vectors [n, d], block after block. See `Stored`."""

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
        blocks = []
        start = 0
        for directions, places, norms in self.blocks:
            first, last = max(0, lo - start), min(len(places), hi - start)
            start += len(places)
            if first < last:
                blocks.append(Block(directions, places[first:last], norms[first:last]))
        if not blocks:  # one empty block says what size and dtype the vectors have
            directions, places, norms = self.blocks[0]
            blocks.append(Block(directions, places[:0], norms[:0]))
        return Shared(tuple(blocks))

    @classmethod
    def cat(cls, parts: Sequence[Shared]) -> Shared:
        return Shared(tuple(block for part in parts for block in part.blocks))
