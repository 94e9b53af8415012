"""Sampling: repeatable chance. What is sampled does not depend on when, or in how many steps, it is drawn."""

from __future__ import annotations

from torch import Tensor


def priority(positions: Tensor, seed: int | Tensor) -> Tensor:
    """A fixed pseudo-random number in [0, 2^31) for every position and seed, by a mixing hash. The lowest are sampled."""
    x = positions + (seed * 0x9E3779B9 & 0x7FFFFFFF)
    for _ in range(2):
        x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
        x = ((x ^ (x >> 12)) * 0x297A2D39) & 0x7FFFFFFF
    return x ^ (x >> 15)
