"""Bias in keys: slots whose votes are part of their keys, so that stock attention kernels, which take no bias, see them.

s (q·k) + b = s [q, c, c, c]·[k, b₁, b₂, b₃], s the scale, c a power of two near 1/s, and b₁ + b₂ + b₃ = b/(s c) in the keys'
dtype: three bfloat16 hold a float32. Keys and values become 8 wider, since kernels want both of one size, in steps of 8.
`docs/theory.md 9.4`. PyTorch's flash attention computes it; on CUDA that of variable lengths, every (row, head) one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from keepkv.attend import sdpa
from keepkv.attend.states import AttentionState, nothing, stacked
from keepkv.errors import BackendError
from keepkv.slots.slots import Slots
from keepkv.slots.vectors import Stored

WIDER = 8
_TERMS = 3  # that a vote is stored in
_LEAST = -1e4  # a logit that is as good as -inf, and a number in every dtype


@dataclass(frozen=True)
class BiasInKeys(Stored):
    """Vectors [n, size] in the first columns of `wide` [n, size + 8]. See `Stored`."""

    wide: Tensor
    size: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.wide), self.size

    @property
    def dtype(self) -> torch.dtype:
        return self.wide.dtype

    @property
    def tensors(self) -> list[Tensor]:
        return [self.wide]

    def unrotated(self) -> Tensor:
        return self.wide[:, : self.size]

    def cut(self, lo: int, hi: int) -> BiasInKeys:
        return BiasInKeys(self.wide[lo:hi], self.size)

    @classmethod
    def cat(cls, parts: Sequence[BiasInKeys]) -> BiasInKeys:
        return BiasInKeys(torch.cat([part.wide for part in parts]), parts[0].size)


def widen(slots: Slots, scale: float) -> Slots:
    """The same slots with their votes in their keys too, for a model whose logits are scale q·k."""
    plain = slots.read()
    plain_keys, plain_values = plain.keys[:], plain.values[:]
    rest = plain.bias.double().clamp(min=_LEAST) / (scale * _factor(scale))
    terms = []
    for _ in range(_TERMS):
        terms.append(rest.to(plain_keys.dtype))
        rest = rest - terms[-1].double()
    keys = pad(torch.cat([plain_keys, torch.stack(terms, 1)], 1), (0, WIDER - _TERMS))
    values = pad(plain_values, (0, WIDER))
    return replace(plain, keys=BiasInKeys(keys, plain_keys.shape[1]), values=BiasInKeys(values, plain_values.shape[1]))


def reason_against(device: torch.device, dtype: torch.dtype, size: int, value_size: int) -> str:
    """Why this backend cannot run queries of `size` over values of `value_size`; "" if it can."""
    if device.type == "cpu":
        return sdpa.reason_against(device, dtype, size, value_size)
    if device.type != "cuda":
        return f"runs on a CPU or on CUDA, not on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"is for bfloat16 and float16 on CUDA, not for {dtype}"
    if size != value_size or size % 8 or size + WIDER > 256:
        return f"needs keys and values of one size, divisible by 8 and at most 248, not {size} and {value_size}"
    return ""


def attend_slots(query: Tensor, slots: Slots, scale: float) -> AttentionState:
    """See `dispatch.attend_slots`, for slots that were made by `widen` with this scale."""
    keys, values = slots.keys, slots.values
    if not (isinstance(keys, BiasInKeys) and isinstance(values, BiasInKeys)):
        raise BackendError(
            "the attention backend 'bias_in_keys' needs slots that were made by keepkv.attend.bias_in_keys.widen"
        )
    votes = query.new_full((*query.shape[:-1], _TERMS), _factor(scale))
    wide_query = pad(torch.cat([query, votes], -1), (0, WIDER - _TERMS))
    kernel = _by_heads if query.device.type == "cpu" else _varlen
    output, log_mass = kernel(wide_query, keys.wide, values.wide, slots, scale)
    return output[..., : values.size], log_mass


def _factor(scale: float) -> float:
    """c, the power of two nearest to 1/scale."""
    return float(2.0 ** round(-math.log2(scale)))


def _by_heads(query: Tensor, keys: Tensor, values: Tensor, slots: Slots, scale: float) -> AttentionState:
    """On a CPU, head by head."""
    of_heads = zip(query.flatten(0, 1), torch.split(keys, slots.counts), torch.split(values, slots.counts), strict=True)
    states = [sdpa.flash(own[None, None], k[None, None], v[None, None], None, scale) for own, k, v in of_heads]
    return stacked([(output[0, 0], log_mass[0, 0]) for output, log_mass in states], len(query))


def _varlen(query: Tensor, keys: Tensor, values: Tensor, slots: Slots, scale: float) -> AttentionState:
    """On CUDA, all heads at once, each a sequence of its own length."""
    batch, heads, rows, size = query.shape
    if not len(keys) or not query.numel():
        return nothing(query, size)
    starts = torch.arange(0, (batch * heads + 1) * rows, rows, dtype=torch.int32, device=query.device)
    flat = query.reshape(-1, 1, size)
    ends = slots.bounds.int()
    longest = max(slots.counts)
    output, log_mass, *_ = torch.ops.aten._flash_attention_forward(
        flat, keys[:, None], values[:, None], starts, ends, rows, longest, 0.0, False, False, scale=scale
    )
    log_mass = log_mass.reshape(batch, heads, rows)
    empty = (slots.bounds[1:] == slots.bounds[:-1]).view(batch, heads, 1)  # of which the kernel says +inf
    output = output.view(batch, heads, rows, size).float().masked_fill(empty[..., None], 0)
    return output, log_mass.masked_fill(empty, -torch.inf)
