"""Merged: what becomes of one head's entries, and the merge that merges nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Merged(NamedTuple):
    keys: Tensor
    values: Tensor
    bias: Tensor
    fallbacks: int = 0
    error: float = (
        0.0  # share of the output lost on held-out reference rows and on the repetition's; 0 where nothing is held out
    )
    mass_error: float = 0.0  # rms error of the slots' mass there, as a share of the true mass
    evict_error: float = 0.0  # error, had the head been evicted


def evict(keys: Tensor, values: Tensor, kept: Tensor, bias: Tensor | None = None) -> Merged:
    """Nothing is merged: what is not kept is gone."""
    return Merged(keys[kept], values[kept], torch.zeros(len(kept), device=keys.device) if bias is None else bias[kept])
