"""Packed: small integers, several to a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits, uint8 [n, d], as uint8 [n, ⌈d·bits/8⌉].

    With w bytes a vector, number i is in byte i mod w, in the bits from bits·⌊i/w⌋ on.

    Example:
        >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), bits=4).tolist()
        [[49, 2]]
    """
    if bits == 8:
        return codes
    width = packed_width(codes.shape[1], bits)
    packed = codes[:, :width].clone()
    for place in range(1, 8 // bits):
        part = codes[:, place * width : (place + 1) * width]
        packed[:, : part.shape[1]] |= part << (place * bits)
    return packed


def unpack(packed: Tensor, bits: int, size: int) -> Tensor:
    """The first `size` numbers of each vector, as they were before `pack`."""
    if bits == 8:
        return packed
    mask = 2**bits - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], 1)[:, :size]


def packed_width(size: int, bits: int) -> int:
    """Bytes of a vector of `size` numbers."""
    return -(-size * bits // 8)
