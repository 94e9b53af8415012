"""Cast: vectors stored in a smaller floating-point dtype than they are read as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keepkv.slots.vectors import Stack, Stored


@dataclass(frozen=True)
class Cast(Stored):
    """A stack of vectors [n, d] that is stored as `stored` and read as `read_as`."""

    stored: Tensor
    read_as: torch.dtype

    @staticmethod
    def of(vectors: Tensor, dtype: torch.dtype) -> Stack:
        """Vectors [n, d] stored in a dtype; those that take no more than it as they are stay as they are."""
        return vectors if vectors.element_size() <= dtype.itemsize else Cast(vectors.to(dtype), vectors.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.stored), self.stored.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.read_as

    @property
    def tensors(self) -> list[Tensor]:
        return [self.stored]

    def unrotated(self) -> Tensor:
        return self.stored.to(self.read_as)

    def cut(self, lo: int, hi: int) -> Cast:
        return Cast(self.stored[lo:hi], self.read_as)

    def to(self, device: torch.device) -> Cast:
        return Cast(self.stored.to(device), self.read_as)

    @classmethod
    def cat(cls, parts: Sequence[Cast]) -> Cast:
        return Cast(torch.cat([part.stored for part in parts]), parts[0].read_as)
