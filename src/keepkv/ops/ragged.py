"""Ragged: which heads of a layer are worked on at once, and lists of entries of different lengths as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 1 << 28  # elements of one matrix per head, all heads of a group together


def groups(heads: int, device: torch.device, size: int) -> list[slice]:
    """The heads of a layer in groups that are worked on at once.

    On a CPU a head is a group, since padding is expensive there and launches are not. Elsewhere a group is as large as memory
    allows.

    Args:
        heads: How many heads the layer has.
        device: Where the work is done.
        size: Elements of the largest matrix that a head needs.

    Example:
        >>> groups(2, torch.device("cpu"), 10)
        [slice(0, 1, None), slice(1, 2, None)]
    """
    many = 1 if device.type == "cpu" else max(1, _AT_ONCE // max(1, size))
    return [slice(lo, min(lo + many, heads)) for lo in range(0, heads, many)]


class Ragged(NamedTuple):
    """Lists of entries of several heads as one batch.

    Attributes:
        entries: [h, n] int64, each head's list, filled up with 0.
        real: [h, n] bool, false where it is filled up.
    """

    entries: Tensor
    real: Tensor

    @staticmethod
    def of(lists: Sequence[Tensor]) -> Ragged:
        """From lists int64 [n_h], all on one device. Nothing is read from the device."""
        if len(lists) == 1:
            return Ragged(lists[0][None], torch.ones(1, len(lists[0]), dtype=torch.bool, device=lists[0].device))
        entries = torch.nn.utils.rnn.pad_sequence(list(lists), batch_first=True)
        return Ragged(entries, first([len(one) for one in lists], entries.shape[1], entries.device))

    def pick(self, x: Tensor) -> Tensor:
        """What x [h, T, ...] has for the entries, [h, n, ...]."""
        entries = self.entries.reshape(self.entries.shape + (1,) * (x.dim() - 2))
        return x.take_along_dim(entries, 1)


def first(counts: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Bool [h, width], true for the first counts[h] of each row."""
    return torch.arange(width, device=device) < torch.tensor(counts, device=device)[:, None]
