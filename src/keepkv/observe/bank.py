"""Bank: a bounded, repeatable sample of the queries that a row of the batch has asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keepkv.ops.sampling import priority

WINDOW = 64  # the newest queries, always in the bank


@dataclass(frozen=True)
class Bank:
    """Queries of one row of the batch.

    Args:
        queries: [H, G, n, d], as they were asked.
        positions: [n] int64, counted from the row's first real token.
    """

    queries: Tensor
    positions: Tensor

    def add(self, queries: Tensor, positions: Tensor, limit: int, seed: int) -> Bank:
        """The bank after more tokens: the newest 64 queries and those of the lowest priority, `limit` in all."""
        queries = torch.cat([self.queries, queries], dim=2)
        positions = torch.cat([self.positions, positions])
        if len(positions) <= limit:
            return Bank(queries, positions)
        rank = priority(positions, seed)
        rank[-min(WINDOW, limit) :] = -1
        stay = rank.argsort(stable=True)[:limit].sort().values
        return Bank(queries[:, :, stay], positions[stay])

    def before(self, position: int) -> Bank:
        """Only what was asked before a position."""
        stay = self.positions < position
        return self if bool(stay.all()) else Bank(self.queries[:, :, stay], self.positions[stay])
