"""Quantized: slots' keys and values as integers of 8 or 4 bits, each vector with a step of its own.

KIVI (arXiv 2402.02750) and KVQuant (arXiv 2401.18079) quantize full caches; here it is what a compression has left. Keys after
RoPE have a few channels that are much larger than the others and would take all levels. So the vectors are rotated by a
Hadamard matrix first, which spreads these channels evenly (QuaRot, arXiv 2404.00456). `docs/theory.md 9.1` has the equations,
and `docs/notes/quantized-slots.md` what else was tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from keepkv.errors import InputError, nearest
from keepkv.ops.dtypes import wide
from keepkv.ops.sampling import priority
from keepkv.slots.vectors import Stack, Stored


@dataclass(frozen=True)
class SlotDtype:
    """How slots' keys and values are stored: as they are, or as integers.

    Args:
        name: As `slot_dtype` has it: "float", "int8" or "int4".
        bits: Of an integer, 8 or 4; 0 where vectors are stored as they are.
    """

    name: str
    bits: int = 0

    def store(self, vectors: Tensor) -> Stack:
        """Vectors [n, d], stored in this way."""
        return Quantized.of(vectors, self) if self.bits else vectors

    def round(self, vectors: Tensor) -> Tensor:
        """Vectors [..., d] as they will be read."""
        return self.store(vectors.flatten(0, -2))[:].view(vectors.shape)

    def bytes(self, size: int, element: int) -> int:
        """Bytes of one vector of `size` numbers of `element` bytes: its integers and a step of two bytes, or its numbers.

        Example:
            >>> SlotDtype("int4", 4).bytes(64, element=2)
            34
        """
        return -(-size * self.bits // 8) + 2 if self.bits else size * element


FLOAT = SlotDtype("float")
SLOT_DTYPES = {"float": FLOAT, "int8": SlotDtype("int8", 8), "int4": SlotDtype("int4", 4)}


def slot_dtype_of(name: str) -> SlotDtype:
    """The way to store slots that is called `name`. Raises InputError."""
    if name not in SLOT_DTYPES:
        raise InputError(f"slot_dtype {name!r}: {nearest(name, SLOT_DTYPES)}")
    return SLOT_DTYPES[name]


@dataclass(frozen=True)
class Quantized(Stored):
    """Vectors x = s (c - m/2) H with m = 2^bits - 1: all 2^bits levels are used, evenly on both sides of 0.

    s = 2/m max |x Hᵀ|, rounded to bfloat16, and c = round(x Hᵀ / s + m/2); H is `hadamard`. So no number of x Hᵀ is wrong by
    more than s/2, except that the rounding of s may add |x Hᵀ| / 512 to the largest. What was read and is stored again stays
    what it is, in float32 and better. `docs/theory.md 9.1`.

    Args:
        codes: c, uint8 [n, d]. Of 4 bits: [n, ⌈d/2⌉], number i in the lower half of byte i, number i + ⌈d/2⌉ in the upper.
        steps: s, bfloat16 [n].
        slot_dtype: How many bits.
        size: d.
        read_as: The dtype of the vectors that are read.
    """

    codes: Tensor
    steps: Tensor
    slot_dtype: SlotDtype
    size: int
    read_as: torch.dtype

    @staticmethod
    def of(vectors: Tensor, slot_dtype: SlotDtype) -> Quantized:
        """Vectors [n, d], rounded."""
        size = vectors.shape[1]
        top = 2**slot_dtype.bits - 1  # m, the largest code
        dtype = wide(vectors.dtype)
        rotated = vectors.to(dtype) @ hadamard(size, dtype, vectors.device).T
        steps = (rotated.abs().amax(1) * (2 / top)).bfloat16()
        step = steps.to(dtype)[:, None]
        step = step.masked_fill(step == 0, 1)  # of a vector of zeros
        codes = (rotated / step + top / 2).round_().clamp_(0, top).to(torch.uint8)
        return Quantized(_packed(codes) if slot_dtype.bits == 4 else codes, steps, slot_dtype, size, vectors.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.steps), self.size

    @property
    def dtype(self) -> torch.dtype:
        return self.read_as

    @property
    def tensors(self) -> list[Tensor]:
        return [self.codes, self.steps]

    @property
    def rotation(self) -> Tensor:
        return hadamard(self.size, wide(self.read_as), self.device)

    def unrotated(self) -> Tensor:
        dtype = wide(self.read_as)
        codes = _unpacked(self.codes, self.size) if self.slot_dtype.bits == 4 else self.codes
        return codes.to(dtype).sub_((2**self.slot_dtype.bits - 1) / 2).mul_(self.steps.to(dtype)[:, None])

    def cut(self, lo: int, hi: int) -> Quantized:
        return replace(self, codes=self.codes[lo:hi], steps=self.steps[lo:hi])

    def to(self, device: torch.device) -> Quantized:
        return replace(self, codes=self.codes.to(device), steps=self.steps.to(device))

    @classmethod
    def cat(cls, parts: Sequence[Quantized]) -> Quantized:
        codes, steps = ([getattr(part, name) for part in parts] for name in ("codes", "steps"))
        return replace(parts[0], codes=torch.cat(codes), steps=torch.cat(steps))


def _packed(codes: Tensor) -> Tensor:
    """Numbers below 16, [n, d], two to a byte."""
    half = -(-codes.shape[1] // 2)
    packed = codes[:, :half].clone()
    packed[:, : codes.shape[1] - half] |= codes[:, half:] << 4
    return packed


def _unpacked(packed: Tensor, size: int) -> Tensor:
    """The first `size` numbers of each row, as they were before `_packed`."""
    return torch.cat([packed & 15, packed >> 4], 1)[:, :size]


@cache
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An orthogonal [d, d] that spreads every channel evenly over many.

    It is block-diagonal, made of Hadamard matrices of the largest power of two that divides d, times fixed random signs, so
    that channels that go together do not meet in one. QuaRot, arXiv 2404.00456, section 3; `docs/theory.md 9.1`.
    """
    with torch.inference_mode(False):
        block = torch.ones(1, 1, dtype=torch.float64)
        while len(block) < size & -size:
            block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
        signs = 1 - 2 * (priority(torch.arange(size), 0) & 1).double()
        blocks = torch.kron(torch.eye(size // len(block)).double(), block / len(block) ** 0.5)
        return (blocks * signs).to(device, dtype)
