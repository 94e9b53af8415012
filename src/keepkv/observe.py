"""Observe: what a layer's attention shows while the prompt is read, in bounded memory.

A `Watch` is a value: seeing more tokens gives a new one. Per batch row it holds a bank of queries: the newest ones and
a sample of the others. The sample is the same however the prompt is cut into chunks and whatever the batch around it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from keepkv.errors import InputError
from keepkv.types import Observation

WINDOW = 64  # the newest queries, always in the bank
_TILE = 1 << 24  # logits held at once


@dataclass(frozen=True)
class Bank:
    """Queries of one row: queries [H, G, n, d] as asked, positions [n] int64 counted from the row's first real token."""

    queries: Tensor
    positions: Tensor

    def add(self, queries: Tensor, positions: Tensor, limit: int, seed: int) -> Bank:
        """The bank after more tokens: the newest WINDOW queries and those of the lowest priority, `limit` in all."""
        queries = torch.cat([self.queries, queries], dim=2)
        positions = torch.cat([self.positions, positions])
        if len(positions) <= limit:
            return Bank(queries, positions)
        rank = _priority(positions, seed)
        rank[-min(WINDOW, limit) :] = -1
        stay = rank.argsort(stable=True)[:limit].sort().values
        return Bank(queries[:, :, stay], positions[stay])


@dataclass(frozen=True)
class Watch:
    """What one layer has shown so far: limit queries per row at most; starts, each row's first real token."""

    layer: int
    limit: int
    seed: int
    with_column_mass: bool
    scale: float
    banks: tuple[Bank, ...] = ()
    starts: tuple[int, ...] = ()
    column_mass: Tensor | None = None  # [B, H, seen] float32
    recall: Tensor | None = None  # [H, T] float32, one row only: see rehearse

    def see(self, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Watch:
        """After a forward pass: queries [B, H, G, new, d], keys [B, H, seen, d], transformers' mask for them."""
        batch, heads, _, new, _ = queries.shape
        seen = keys.shape[2]
        starts = _starts(mask, batch, seen)
        empty = Bank(queries[0, :, :, :0], torch.empty(0, dtype=torch.int64, device=queries.device))
        banks = []
        for row, start in enumerate(starts):
            first = max(start, seen - new)  # the first real token among the new ones
            fresh = queries[row, :, :, first - seen + new :]
            positions = torch.arange(first - start, seen - start, device=queries.device)
            old = self.banks[row] if self.banks else empty
            banks.append(old.add(fresh, positions, self.limit, self.seed))
        mass = self.column_mass
        if self.with_column_mass:
            grown = queries.new_zeros(batch, heads, seen, dtype=torch.float32)
            if mass is not None:
                grown[:, :, : mass.shape[2]] = mass
            mass = grown + _column_mass(queries, keys, starts, self.scale)
        return replace(self, banks=tuple(banks), starts=starts, column_mass=mass)

    def rehearse(self, peak: Tensor) -> Watch:
        """After a piece of the text was repeated: peak [H, T], the largest share each token got."""
        return replace(self, recall=peak if self.recall is None else torch.maximum(self.recall, peak))

    def observation(self, row: int, keys: Tensor, values: Tensor, inv_freq: Tensor) -> Observation:
        """The Observation of one batch row; keys and values [B, H, seen, ...] with padding."""
        start, bank = self.starts[row], self.banks[row]
        mass = None if self.column_mass is None else self.column_mass[row, :, start:]
        return Observation(
            keys[row, :, start:], values[row, :, start:], bank.queries, bank.positions, inv_freq, self.scale,
            self.layer, self.seed, mass, self.recall,
        )  # fmt: skip

    def rows(self, indices: Tensor) -> Watch:
        """The given batch rows, in that order."""
        take = indices.tolist()
        mass = None if self.column_mass is None else self.column_mass[indices]
        banks, starts = tuple(self.banks[row] for row in take), tuple(self.starts[row] for row in take)
        return replace(self, banks=banks, starts=starts, column_mass=mass)


def _starts(mask: Tensor | None, batch: int, seen: int) -> tuple[int, ...]:
    """The first visible column of every row of a mask [B or 1, 1, q, seen]; raises InputError unless the rest is visible."""
    if mask is None:
        return (0,) * batch
    last = mask[:, 0, -1]
    visible = last if mask.dtype == torch.bool else last > torch.finfo(mask.dtype).min / 2
    hidden = seen - visible.sum(-1)
    if visible.cummax(-1).values.ne(visible).any():
        raise InputError("KeepCache reads left-padded batches; the attention mask hides tokens after the first visible one")
    return tuple(hidden.expand(batch).tolist())


def _column_mass(queries: Tensor, keys: Tensor, starts: tuple[int, ...], scale: float) -> Tensor:
    """Attention of the new queries summed per token [B, H, seen], mean over the group, float32, a tile at a time."""
    batch, heads, group, new, _ = queries.shape
    seen = keys.shape[2]
    token = torch.arange(seen, device=keys.device)
    first = torch.tensor(starts, device=keys.device)[:, None, None]
    total = torch.zeros(batch, heads, seen, device=keys.device)
    step = max(1, _TILE // (batch * heads * group * seen))
    wide = keys.float()
    for lo in range(0, new, step):
        part = queries[:, :, :, lo : lo + step].float() * scale
        asked = torch.arange(lo, lo + part.shape[3], device=keys.device)[:, None] + seen - new
        hidden = (token > asked) | (token < first)  # [B, q, seen]
        logits = torch.einsum("bhgqd,bhtd->bhgqt", part, wide).masked_fill_(hidden[:, None, None], -torch.inf)
        total += logits.softmax(-1).nan_to_num_().sum(3).mean(2)  # nan: a padding query sees nothing
    return total


def _priority(positions: Tensor, seed: int) -> Tensor:
    """A fixed pseudo-random number in [0, 2^31) per position (a mixing hash): the lowest are sampled."""
    x = positions + (seed * 0x9E3779B9 & 0x7FFFFFFF)
    for _ in range(2):
        x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
        x = ((x ^ (x >> 12)) * 0x297A2D39) & 0x7FFFFFFF
    return x ^ (x >> 15)
