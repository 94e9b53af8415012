"""Rotary positions: moving a query from the place where it was asked to a place where it could be asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """How the keys and queries of a layer turn with their position: pairs of dimensions, each by an angle per position.

    `docs/theory.md 1.6`; RoFormer, arXiv 2104.09864, section 3.2. Models differ in which dimensions are a pair, in how many
    rotate, and in the frequencies. `keepkv.models.rotation` asks a model for all three.

    Args:
        first: The first dimension of every pair: one slice of the d dimensions.
        second: The second dimension of every pair, in the same order.
        frequencies: [r/2], radians per position: pair (a, b) becomes (a cos - b sin, b cos + a sin). Negative ones turn the
            other way. The other dimensions, and all of them where there are no frequencies, stay as they are.

    Examples:
        >>> rotation = Rotation.halves(torch.tensor([1.0, 0.1]))  # dimension 0 with 2, and 1 with 3
        >>> query = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
        >>> there = rotation.rotate(query, torch.tensor([7]))
        >>> torch.allclose(rotation.rotate(there, torch.tensor([-7])), query)
        True
    """

    first: slice
    second: slice
    frequencies: Tensor

    @classmethod
    def halves(cls, frequencies: Tensor) -> Rotation:
        """Dimension i with i + r/2, as in Llama; frequencies [r/2]."""
        half = len(frequencies)
        return cls(slice(0, half, 1), slice(half, 2 * half, 1), frequencies)

    @classmethod
    def none(cls) -> Rotation:
        """Of a layer without rotary positions: nothing moves."""
        return cls.halves(torch.zeros(0))

    def rotate(self, x: Tensor, shift: Tensor) -> Tensor:
        """Moves queries or keys by `shift` positions: R(p + shift) q from R(p) q, whatever p and the attention scaling are.

        Args:
            x: [..., N, d], float32 or better.
            shift: [N], whole numbers.

        Returns:
            [..., N, d].
        """
        angle = self.angles(shift)
        return self.turn(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype))

    def angles(self, shift: Tensor) -> Tensor:
        """The angles of all pairs at positions [N], [N, r/2] float64: long contexts lose float32 angles."""
        frequencies = self.frequencies.to(shift.device, torch.float64)
        return shift.to(torch.float64)[:, None] * frequencies

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Applies cos and sin [..., r/2] to the pairs of x [..., d]: a rotation, or a mean of rotations."""
        a, b = x[..., self.first], x[..., self.second]
        turned = x.clone()
        turned[..., self.first] = a * cos - b * sin
        turned[..., self.second] = b * cos + a * sin
        return turned
