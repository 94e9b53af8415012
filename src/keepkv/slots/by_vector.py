"""QuantizedByVector: slots' vectors as integers of 8, 4 or 2 bits, each vector with a step of its own.

KVQuant (arXiv 2401.18079) quantizes full caches; here it is what a compression has left. A few large channels would take all
levels. So the vectors are rotated by a Hadamard matrix first, which spreads these channels evenly (QuaRot, arXiv 2404.00456).
`docs/theory.md 9.1` has the equations, and `docs/notes/quantized-slots.md` what else was tried. Values are stored so; files of
format 4 and older have keys, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from keepkv.ops.dtypes import wide
from keepkv.ops.sampling import priority
from keepkv.slots.packed import pack, packed_width, unpack
from keepkv.slots.vectors import Stored

_STEP_OF_FOUR = 0.9957


@dataclass(frozen=True)
class QuantizedByVector(Stored):
    """Vectors x = s (c - m/2) H with m = 2^bits - 1: all 2^bits levels are used, evenly on both sides of 0.

    s = 2/m max |x Hᵀ|, rounded to bfloat16, and c = round(x Hᵀ / s + m/2); H is `hadamard`. So no number of x Hᵀ is wrong by
    more than s/2, except that the rounding of s may add |x Hᵀ| / 512 to the largest. What was read and is stored again stays
    what it is, in float32 and better. `docs/theory.md 9.1`.

    With 2 bits the largest number would leave two of the four levels to hardly any. There s is .9957 times the root mean square
    of x Hᵀ, the best step of four even levels for normal numbers (Max, IRE Trans. Inf. Theory 6, 1960), and what lies beyond
    the last level becomes that.

    Args:
        codes: c, uint8 [n, ⌈d·bits/8⌉], see `pack`.
        steps: s, bfloat16 [n].
        bits: Of an integer.
        size: d.
        read_as: The dtype of the vectors that are read.
    """

    codes: Tensor
    steps: Tensor
    bits: int
    size: int
    read_as: torch.dtype

    @staticmethod
    def of(vectors: Tensor, bits: int) -> QuantizedByVector:
        """Vectors [n, d], rounded."""
        size = vectors.shape[1]
        top = 2**bits - 1  # m, the largest code
        dtype = wide(vectors.dtype)
        rotated = vectors.to(dtype) @ hadamard(size, dtype, vectors.device).T
        if bits == 2:
            steps = (rotated.square().mean(1).sqrt() * _STEP_OF_FOUR).bfloat16()
        else:
            steps = (rotated.abs().amax(1) * (2 / top)).bfloat16()
        step = steps.to(dtype)[:, None]
        step = step.masked_fill(step == 0, 1)  # of a vector of zeros
        codes = (rotated / step + top / 2).round_().clamp_(0, top).to(torch.uint8)
        return QuantizedByVector(pack(codes, bits), steps, bits, size, vectors.dtype)

    @staticmethod
    def vector_bytes(size: int, bits: int) -> int:
        """Bytes of one vector: its integers and its step."""
        return packed_width(size, bits) + 2

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
        codes = unpack(self.codes, self.bits, self.size)
        return codes.to(dtype).sub_((2**self.bits - 1) / 2).mul_(self.steps.to(dtype)[:, None])

    def cut(self, lo: int, hi: int) -> QuantizedByVector:
        return replace(self, codes=self.codes[lo:hi], steps=self.steps[lo:hi])

    def to(self, device: torch.device) -> QuantizedByVector:
        return replace(self, codes=self.codes.to(device), steps=self.steps.to(device))

    @classmethod
    def cat(cls, parts: Sequence[QuantizedByVector]) -> QuantizedByVector:
        codes, steps = ([getattr(part, name) for part in parts] for name in ("codes", "steps"))
        return replace(parts[0], codes=torch.cat(codes), steps=torch.cat(steps))


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
