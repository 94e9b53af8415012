"""The dtype that sums are computed in."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that attention is computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
