"""Attention over slots with votes: each part gives its output and log-sum-exp, and the parts are joined exactly.

`exact` is the specification: plain softmax in the dtype it is given. The other functions are what the cache runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.types import Slots

Part = tuple[Tensor, Tensor]  # output [..., R, d_v] and log-sum-exp [..., R], both float32 or better
_TILE = 1 << 24  # logits held at once


def exact(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Part:
    """o = softmax(scale q·k + b) v and its log-sum-exp, for queries [..., R, d], keys [..., n, d], bias [..., 1 or R, n]."""
    logits = scale * (query @ keys.transpose(-1, -2)) + bias
    return logits.softmax(-1) @ values, logits.logsumexp(-1)


def attend_slots(query: Tensor, slots: Slots, scale: float) -> Part:
    """Attention of query [B, H, R, d] over the compact part, head by head as it is stored: nothing is padded."""
    batch, heads, rows, _ = query.shape
    output = query.new_empty(batch * heads, rows, slots.values.shape[1], dtype=_wide(query.dtype))
    log_mass = output.new_empty(batch * heads, rows)
    flat = query.reshape(batch * heads, rows, -1)
    for head, (lo, hi) in enumerate(zip(slots.offsets, slots.offsets[1:], strict=False)):
        output[head], log_mass[head] = _attend(flat[head], slots.keys[lo:hi], slots.values[lo:hi], slots.bias[lo:hi], scale)
    return output.view(batch, heads, rows, -1), log_mass.view(batch, heads, rows)


def attend_tail(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float) -> Part:
    """Attention of query [B, H, R, d] over the dense tail [B, H, n, d]; visible, bool or additive, broadcasts to the logits."""
    rows = query.shape[2]
    step = max(1, _TILE // max(1, query.shape[0] * query.shape[1] * keys.shape[2]))
    parts = []
    for lo in range(0, rows, step):
        bias = None
        if visible is not None:
            bias = visible[:, :, lo : lo + step]
            if bias.dtype == torch.bool:
                bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill_(~bias, -torch.inf)
        parts.append(_attend(query[:, :, lo : lo + step], keys, values, bias, scale))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2)


def attend_watched(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, answered: int) -> tuple[Part, Tensor]:
    """Attention of the first `answered` of query [H, R, d], scaled, over keys [H, T, d], all visible, in float32 or better.

    bias [H, T] or None is added to the logits. And what all R rows together pay each entry: the root mean square over rows
    of its softmax share, [H, T].
    """
    (heads, rows, _), tokens = query.shape, keys.shape[1]
    output, log_mass = query.new_empty(heads, answered, values.shape[2]), query.new_empty(heads, rows)
    paid = query.new_zeros(heads, tokens)
    step = min(rows, max(1, (1 << 21) // tokens))  # a tile that stays in a CPU's cache
    tile = query.new_empty(step, tokens)
    for head in range(heads):
        for lo in range(0, rows, step):
            part = query[head, lo : lo + step]
            share = torch.mm(part, keys[head].T, out=tile[: len(part)])
            if bias is not None:
                share.add_(bias[head])
            top = share.amax(-1)
            total = share.sub_(top[:, None]).exp_().sum(-1)
            share.mul_(total.reciprocal()[:, None])
            log_mass[head, lo : lo + step] = top + total.log()
            if lo < answered:
                torch.mm(share[: answered - lo], values[head], out=output[head, lo : lo + step])
            paid[head] += share.square_().sum(0)
    return (output, log_mass[:, :answered]), (paid / rows).sqrt_()


def join(first: Part, second: Part) -> Part:
    """Two parts as one, exactly: o = (M1 o1 + M2 o2) / (M1 + M2), M = exp(log-sum-exp). The algebra of flash-decoding."""
    log_mass = torch.logaddexp(first[1], second[1])
    weight = (second[1] - log_mass).exp().nan_to_num_()[..., None]  # nan where neither part sees anything
    return torch.lerp(first[0], second[0], weight), log_mass


def _attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> Part:
    """One dense block, in float32 or better throughout: a bfloat16 logit of 30 is off by up to 0.1."""
    wide = _wide(query.dtype)
    logits = (query.to(wide) * scale) @ keys.to(wide).transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    log_mass = logits.logsumexp(-1)
    share = (logits - log_mass[..., None]).exp_()
    if bias is not None:
        share = share.nan_to_num_()  # rows that see nothing
    return share @ values.to(wide), log_mass


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
