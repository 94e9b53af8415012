"""The `triton` backend: when the kernels of `triton_kernels` can run. Triton itself is only imported when they may."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from keepkv.attend.rotation import rotated, unrotated
from keepkv.attend.states import AttentionState
from keepkv.slots.slots import Slots


def reason_against(device: torch.device, dtype: torch.dtype, size: int, value_size: int) -> str:
    """Why this backend cannot run queries of `size` over values of `value_size`; "" if it can."""
    if find_spec("triton") is None:
        return "needs Triton: pip install 'keepkv[gpu]'"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"runs on CUDA, not on {device} (or, to test it, anywhere with TRITON_INTERPRET=1)"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32, and is not for {dtype}"
    if max(size, value_size) > 256:
        return f"is for sizes up to 256, not {size} and {value_size}"
    from keepkv.attend import triton_kernels  # imports Triton

    return triton_kernels.trial(device, dtype, size, value_size) if device.type == "cuda" else ""


def attend_slots(query: Tensor, slots: Slots, scale: float) -> AttentionState:
    """See `dispatch.attend_slots`. Quantized slots are read as integers; the rotated query has the dtype of the model."""
    from keepkv.attend import triton_kernels  # imports Triton

    output, log_mass = triton_kernels.attend_slots(rotated(query, slots).to(query.dtype), slots, scale)
    return unrotated(output, slots), log_mass
