"""Merged: what becomes of one head's entries, and the merge that merges nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Merged(NamedTuple):
    """The slots of one head, and how good they are.

    Attributes:
        keys: [n, d].
        values: [n, d_v].
        bias: [n], the logarithm of the votes.
        fallbacks: How often the merge had to fall back on something simpler.
        error: The share of the output that is lost, over reference rows that were held out and over the repetition; 0 where
            nothing is held out. `docs/theory.md 6.5`.
        mass_error: The root mean square error of the slots' mass there, as a share of the true mass.
        evict_error: What `error` would be if the other entries had only been dropped.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    fallbacks: int = 0
    error: float = 0.0
    mass_error: float = 0.0
    evict_error: float = 0.0


def evict(keys: Tensor, values: Tensor, kept: Tensor, bias: Tensor | None = None) -> Merged:
    """Nothing is merged: what is not kept is gone. keys [T, d], values [T, d_v], kept int64 [n], bias [T] or None."""
    return Merged(keys[kept], values[kept], torch.zeros(len(kept), device=keys.device) if bias is None else bias[kept])
