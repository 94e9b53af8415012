"""The `sdpa` backend: attention on a CPU in float32, by PyTorch's flash attention kernel or by a few matrix products.

The kernel is a private operator of PyTorch that returns the log-sum-exp with the output. `available` tries it once against
`states.exact`; where it is missing or means something else, `dispatch.backend_for` picks `eager` instead, and says so. Query
heads that share a KV head are rows of one query, so keys and values are never repeated. bfloat16 and float16 are widened first,
a head or a tail at a time, which is as fast as the kernel's own low precision, and more exact.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from keepkv.attend.rotation import rotated, unrotated
from keepkv.attend.states import AttentionState, exact, merge_states, nothing, stacked
from keepkv.ops.dtypes import wide
from keepkv.slots.slots import Slots

FEW = 48  # rows of a head up to which matrix products are faster than the kernel
_TILE = 1 << 22  # elements of a float mask made at once


def reason_against(device: torch.device, dtype: torch.dtype, size: int, value_size: int) -> str:
    """Why this backend cannot run queries of `size` over values of `value_size`; "" if it can."""
    if device.type != "cpu":
        return f"runs on a CPU, not on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32, and is not for {dtype}"
    if size != value_size:
        return f"needs keys and values of one size, not {size} and {value_size}"
    return "" if available() else f"needs a kernel that PyTorch {torch.__version__} does not have as expected"


@cache
def available() -> bool:
    """Whether this PyTorch has the kernel, with a float mask and a natural log-sum-exp."""
    query, keys, values, mask = (torch.arange(n).reshape(shape).float().cos() for n, shape in _TRIAL)
    try:
        state = _kernel(query, keys, values, mask, False, 0.5)
    except (AttributeError, RuntimeError, TypeError):
        return False
    pairs = zip(state, exact(query, keys, values, mask, 0.5), strict=True)
    return all(ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in pairs)


_TRIAL = ((24, (1, 2, 3, 4)), (40, (1, 2, 5, 4)), (40, (1, 2, 5, 4)), (30, (1, 2, 3, 5)))


def attend_few(
    query: Tensor,
    slots: Slots,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Output of one softmax over slots, tail and sinks [H, R], for few rows. Other arguments as in `dispatch.attend`.

    A head's logits over the tail and over its slots are written side by side, so that nothing is padded or merged. Products
    write where they belong, which autograd cannot follow.
    """
    batch, heads, rows, size = query.shape
    tail = keys.shape[2]
    dtype = wide(query.dtype)
    flat = (query.to(dtype) * scale).flatten(0, 1)
    newer = torch.bmm(flat, keys.to(dtype).flatten(0, 1).transpose(1, 2))  # [B*H, R, n]
    if visible is not None:
        newer.view(batch, heads, rows // visible.shape[2], visible.shape[2], tail).add_(additive(visible, dtype)[:, :, None])
    key_rotation, value_rotation = slots.rotations
    slots = slots.unrotated()
    if slots.keys.dtype != dtype:
        slots = replace(slots, keys=slots.keys[:].to(dtype), values=slots.values[:].to(dtype))
    rotated = flat if key_rotation is None else flat @ key_rotation.T
    output = flat.new_empty(batch * heads, rows, slots.values.shape[1])
    tail_values = values.to(dtype).flatten(0, 1)
    of_heads = zip(rotated.unbind(), newer.unbind(), tail_values.unbind(), slots.per_head, output.unbind(), strict=True)
    for number, (own, new, new_values, (old_keys, old_values, bias), to_output) in enumerate(of_heads):
        width = tail + len(bias)
        logits = own.new_empty(rows, width + (sinks is not None))
        logits[:, :tail] = new
        if sinks is not None:
            logits[:, width] = sinks[number % heads]
        if size <= 64:  # the faster way round depends on the size
            torch.addmm(bias, own, old_keys.T, out=logits[:, tail:width])
        else:
            torch.add(torch.mm(old_keys, own.T).T, bias, out=logits[:, tail:width])
        share = logits.softmax(-1)
        if visible is not None or not tail:
            share.nan_to_num_()  # rows that see nothing
        torch.mm(share[:, tail:width], old_values, out=to_output)
        if value_rotation is not None:
            to_output.copy_(to_output @ value_rotation)
        to_output.addmm_(share[:, :tail], new_values)
    return output.view(batch, heads, rows, -1)


def attend_slots(query: Tensor, slots: Slots, scale: float) -> AttentionState:
    """See `dispatch.attend_slots`: head by head, as they are stored."""
    states = []
    for own, (keys, values, bias) in zip(rotated(query, slots).flatten(0, 1), slots.unrotated().per_head, strict=True):
        output, log_mass = flash(own[None, None], keys[None, None], values[None, None], bias.expand(1, 1, len(own), -1), scale)
        states.append((output[0, 0], log_mass[0, 0]))
    output, log_mass = stacked(states, len(query))
    return unrotated(output, slots), log_mass


def attend_tail(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float) -> AttentionState:
    """See `dispatch.attend_tail`. Plain causality is left to the kernel, which skips what it hides; other masks are tiled."""
    if visible is None:
        return flash(query, keys, values, None, scale)
    if len(visible) > 1:  # rows of a batch with their own padding
        rows = [
            attend_tail(query[i : i + 1], keys[i : i + 1], values[i : i + 1], visible[i : i + 1], scale)
            for i in range(len(visible))
        ]
        return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
    batch, heads, count, size = query.shape
    new, tail = visible.shape[2], keys.shape[2]
    apart = query.reshape(batch * heads, -1, new, size)
    keys_apart, values_apart = (x.flatten(0, 1)[:, None].expand(-1, count // new, -1, -1) for x in (keys, values))
    if is_causal(visible, tail):
        old = tail - new
        newest = flash(apart, keys_apart[:, :, old:], values_apart[:, :, old:], None, scale, causal=True)
        older = flash(query, keys[:, :, :old], values[:, :, :old], None, scale)
        return merge_states(older, _together(newest, batch, heads))
    step = max(1, _TILE // max(1, tail))
    tiles = []
    for lo in range(0, new, step):
        mask = additive(visible[:, :, lo : lo + step], wide(query.dtype))
        tiles.append(flash(apart[:, :, lo : lo + step], keys_apart, values_apart, mask, scale))
    return _together((torch.cat([tile[0] for tile in tiles], 2), torch.cat([tile[1] for tile in tiles], 2)), batch, heads)


def _together(state: AttentionState, batch: int, heads: int) -> AttentionState:
    """The state of [B*H, G, new] rows as one of [B, H, G*new]."""
    output, log_mass = state
    return output.reshape(batch, heads, -1, output.shape[-1]), log_mass.reshape(batch, heads, -1)


def is_causal(visible: Tensor, tail: int) -> bool:
    """Whether a mask [1, 1, new, tail] is that of the newest tokens of a text: row i sees all but the last new - 1 - i."""
    new = visible.shape[2]
    if visible.dtype != torch.bool or visible.shape[:2] != (1, 1) or tail < new:
        return False
    newest = torch.ones(new, new, dtype=torch.bool, device=visible.device).tril()
    return bool(visible[..., : tail - new].all()) and torch.equal(visible[0, 0, :, tail - new :], newest)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask, bool or additive, as it is added to the logits."""
    if visible.dtype != torch.bool:
        return visible.to(dtype)
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def flash(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, causal: bool = False
) -> AttentionState:
    """PyTorch's kernel, kept from what it gets wrong.

    That is: no rows or no keys (it divides by zero), a last dimension that is strided (it is read as if it were not), and rows
    that see nothing (it gives a log-sum-exp of 0, not -inf).

    Args:
        query: [B, H, R, d].
        keys: [B, H, n, d].
        values: [B, H, n, d].
        mask: Broadcasting to [B, H, R, n], additive; or None.
        scale: The factor on q·k.
        causal: R = n, and row i sees keys 0 to i.
    """
    if not query.numel() or not keys.shape[2]:
        return nothing(query, values.shape[-1])
    dtype = wide(query.dtype)
    query, keys, values = (_dense(x.to(dtype)) for x in (query, keys, values))
    output, log_mass = _kernel(query, keys, values, mask, causal, scale)
    if mask is not None and bool((log_mass == 0).any()):
        log_mass = log_mass.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
    return output, log_mass


def _kernel(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scale: float) -> AttentionState:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    output, log_mass = operator(query, keys, values, 0.0, causal, attn_mask=mask, scale=scale)
    return output, log_mass


def _dense(x: Tensor) -> Tensor:
    """x, with a last dimension that is not strided."""
    return x if x.stride(-1) == 1 else x.contiguous()
