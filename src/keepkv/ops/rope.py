"""Rotary positions: moving a query from the place where it was asked to a place where it could be asked."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, shift: Tensor, inv_freq: Tensor) -> Tensor:
    """Moves queries or keys by `shift` positions: R(p + shift) q from R(p) q, whatever p and the attention scaling are.

    `docs/theory.md 1.6`; RoFormer, arXiv 2104.09864, section 3.2.

    Args:
        x: [..., N, d], float32 or better.
        shift: [N], whole numbers.
        inv_freq: [r/2]. The first r dimensions rotate, in the rotate-half layout of Llama, Qwen, Mistral, Phi-3 and Gemma; the
            others stay.

    Returns:
        [..., N, d].
    """
    angle = shift.to(torch.float64)[:, None] * inv_freq.to(torch.float64)  # long contexts lose float32 angles
    return apply_rotary(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies cos and sin [..., r/2] to the r first dimensions of x: a rotation, or a mean of rotations."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
