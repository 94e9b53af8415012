"""Vectors: stacks of vectors [n, d] that may be stored in another way than as a tensor, and are read like one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Stored(ABC):
    """A frozen stack of n vectors [n, d]. stack[lo:hi] and stack[indices] are tensors of `dtype`, made anew each time.

    It is cut and joined without being read.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(n, d)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What the vectors are read as."""

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All that is held, to count its bytes."""

    @abstractmethod
    def unrotated(self) -> Tensor:
        """C [n, d], where the vectors are C H, see `rotation`; in `dtype`, or in float32 if that is less and there is an H."""

    @property
    def rotation(self) -> Tensor | None:
        """H, orthogonal [d, d]. Rotate the query instead of the stored vectors: q·(C H) = (q Hᵀ)·C. None means no rotation."""
        return None

    def read(self) -> Tensor:
        """All vectors, [n, d]."""
        return (self.unrotated() if self.rotation is None else self.unrotated() @ self.rotation).to(self.dtype)

    @abstractmethod
    def cut(self, lo: int, hi: int) -> Stored:
        """Vectors lo to hi - 1; nothing is copied."""

    @classmethod
    @abstractmethod
    def cat(cls, parts: Sequence[Any]) -> Stored:
        """Stacks of this kind, one after the other."""

    def to(self, device: torch.device) -> Stack:
        """On another device, as plain vectors unless a kind of stack says otherwise."""
        return self.read().to(device)

    @property
    def device(self) -> torch.device:
        """Where it is held."""
        return self.tensors[0].device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        if not isinstance(which, slice):
            return self.read()[which]
        lo, hi, _ = which.indices(len(self))
        return self.cut(lo, hi).read()


Stack = Tensor | Stored


def tensors(stack: Stack) -> list[Tensor]:
    """All that a stack holds, to count its bytes."""
    return [stack] if isinstance(stack, Tensor) else stack.tensors


def unrotated(stack: Stack) -> Tensor:
    """See `Stored.unrotated`."""
    return stack if isinstance(stack, Tensor) else stack.unrotated()


def rotation(stack: Stack) -> Tensor | None:
    """See `Stored.rotation`."""
    return None if isinstance(stack, Tensor) else stack.rotation


def cut(stack: Stack, lo: int, hi: int) -> Stack:
    """Vectors lo to hi - 1; nothing is copied."""
    return stack[lo:hi] if isinstance(stack, Tensor) else stack.cut(lo, hi)


def cat(stacks: Sequence[Stack]) -> Stack:
    """Stacks of one kind, one after the other. Empty tensors go with any kind: rows of padding have no slots."""
    kinds = [stack for stack in stacks if not isinstance(stack, Tensor)]
    return kinds[0].cat(kinds) if kinds else torch.cat([stack for stack in stacks if isinstance(stack, Tensor)])
