"""Heads: which heads of a layer are worked on at once, and lists of entries of different lengths as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 1 << 28  # elements of one matrix per head, all heads of a group together


def groups(heads: int, device: torch.device, size: int) -> list[slice]:
    """The heads of a layer, cut into groups: one by one on a CPU, which padding costs and launches do not; else many at once.

    size: elements of the largest matrix that a head needs.
    """
    many = 1 if device.type == "cpu" else max(1, _AT_ONCE // max(1, size))
    return [slice(lo, min(lo + many, heads)) for lo in range(0, heads, many)]


class Ragged(NamedTuple):
    """entries [h, n] int64: each head's, filled up with 0; real [h, n] bool: which are not filled up."""

    entries: Tensor
    real: Tensor

    @staticmethod
    def of(lists: Sequence[Tensor]) -> Ragged:
        """Lists int64 [n_h] of one device. Nothing is read from the device."""
        if len(lists) == 1:
            return Ragged(lists[0][None], torch.ones(1, len(lists[0]), dtype=torch.bool, device=lists[0].device))
        entries = torch.nn.utils.rnn.pad_sequence(list(lists), batch_first=True)
        return Ragged(entries, first([len(one) for one in lists], entries.shape[1], entries.device))

    def pick(self, x: Tensor) -> Tensor:
        """Of x [h, T, ...] the entries, [h, n, ...]."""
        entries = self.entries.reshape(self.entries.shape + (1,) * (x.dim() - 2))
        return x.take_along_dim(entries, 1)


def first(counts: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Bool [h, width], true for the first counts[h] of each row."""
    return torch.arange(width, device=device) < torch.tensor(counts, device=device)[:, None]
