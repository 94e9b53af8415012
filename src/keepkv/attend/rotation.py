"""Rotation: queries into the basis in which quantized slots are stored, and outputs back out of it."""

from __future__ import annotations

from torch import Tensor

from keepkv.slots.slots import Slots


def rotated(query: Tensor, slots: Slots) -> Tensor:
    """q Hᵀ, in the dtype of H, for keys stored as C H: q·(C H) = (q Hᵀ)·C. The query itself where keys are not rotated."""
    rotation = slots.rotations[0]
    return query if rotation is None else query.to(rotation.dtype) @ rotation.T


def unrotated(output: Tensor, slots: Slots) -> Tensor:
    """o H, for an output o that was computed with values stored as C H. The output itself where values are not rotated."""
    rotation = slots.rotations[1]
    return output if rotation is None else output @ rotation
