"""Slots and masks of every kind, and attention over them as a plain softmax in float64."""

from __future__ import annotations

import torch

from keepkv.attend import sdpa
from keepkv.attend.states import exact
from keepkv.slots.slots import Slots

COUNTS = [1, 15, 63, 255, 0, 1000]  # very different lengths in one layer


def slots_of(
    counts: list[int], size: int = 16, value_size: int = 24, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Slots:
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    offsets = tuple(torch.tensor([0, *counts]).cumsum(0).tolist())
    return Slots(
        torch.randn(total, size, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(total, value_size, generator=generator, dtype=torch.float64).to(dtype),
        torch.rand(total, generator=generator) * 5,
        torch.arange(total, dtype=torch.int32),
        offsets,
    )


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expected(query, slots, tail_keys, tail_values, visible, scale):
    """Per head: one softmax over slots and visible tail tokens, in float64."""
    batch, heads, rows, _ = query.shape
    output = torch.empty(batch, heads, rows, slots.values.shape[1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            lo, hi = slots.offsets[b * heads + h : b * heads + h + 2]
            keys = torch.cat([slots.keys[lo:hi], tail_keys[b, h]]).double()
            values = torch.cat([slots.values[lo:hi], tail_values[b, h]]).double()
            bias = torch.zeros(rows, len(keys), dtype=torch.float64)
            bias[:, : hi - lo] = slots.bias[lo:hi]
            bias[:, hi - lo :].masked_fill_(~visible[b, 0], -torch.inf)
            output[b, h] = exact(query[b, h].double(), keys, values, bias, scale)[0]
    return output


CPU, NEW, GROUP, TAIL = torch.device("cpu"), 5, 3, 9


def masks(new: int, tail: int, batch: int = 2) -> dict[str, torch.Tensor | None]:
    """Every kind of mask that reaches attention; some leave rows that see nothing of the tail."""
    causal = torch.ones(new, tail, dtype=torch.bool).tril(tail - new)[None, None]
    padded = causal.expand(batch, -1, -1, -1).clone()
    padded[1, :, :, : tail - new + 2] = False
    scattered = torch.rand(batch, 1, new, tail, generator=torch.Generator().manual_seed(4)) < 0.3
    return {
        "none": None,
        "causal": causal,
        "padded": padded,
        "scattered": scattered,
        "hidden": torch.zeros_like(causal),
        "additive": randn(batch, 1, new, tail, seed=5).masked_fill(~scattered, -torch.inf),
        "finite": torch.zeros(1, 1, new, tail).masked_fill(~causal, torch.finfo(torch.float32).min),
    }


def truth_for(query, slots, keys, values, visible, scale):
    """One softmax per head over slots and tail in float64; 0 for rows that see nothing."""
    batch, heads, rows, _ = query.shape
    output = torch.empty(batch, heads, rows, values.shape[3], dtype=torch.float64)
    bias = torch.zeros(1, 1, 1, keys.shape[2]) if visible is None else visible
    bias = sdpa.additive(bias, torch.float64).expand(batch, 1, -1, -1)
    for b in range(batch):
        for h in range(heads):
            lo, hi = slots.offsets[b * heads + h : b * heads + h + 2]
            tail = bias[b, 0].repeat(rows // bias.shape[2], 1)
            both = torch.cat([slots.bias[lo:hi].double().expand(rows, -1), tail], 1)
            k, v = (torch.cat(pair).double() for pair in ((slots.keys[lo:hi], keys[b, h]), (slots.values[lo:hi], values[b, h])))
            output[b, h] = exact(query[b, h].double(), k, v, both, scale)[0].nan_to_num()
    return output


def slots_in(slots: Slots, dtype: torch.dtype) -> Slots:
    return Slots(slots.keys.to(dtype), slots.values.to(dtype), slots.bias, slots.positions, slots.offsets)
