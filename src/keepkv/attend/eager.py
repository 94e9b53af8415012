"""The `eager` backend: plain softmax in float32 or better, head by head. It runs everywhere and with every dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.attend.rotation import rotated, unrotated
from keepkv.attend.states import AttentionState, block, stacked
from keepkv.ops.softmax import PLAIN, Softmax
from keepkv.slots.slots import Slots


def reason_against(device: torch.device, dtype: torch.dtype, size: int, value_size: int) -> str:
    """Nothing speaks against it: this backend always runs."""
    return ""


def attend_slots(query: Tensor, slots: Slots, scale: float, softmax: Softmax = PLAIN) -> AttentionState:
    """See `dispatch.attend_slots`. This is the only backend that caps logits."""
    of_heads = zip(rotated(query, slots).flatten(0, 1), slots.unrotated().per_head, strict=True)
    states = [block(own, keys, values, bias, scale, softmax) for own, (keys, values, bias) in of_heads]
    output, log_mass = stacked(states, len(query))
    return unrotated(output, slots), log_mass
