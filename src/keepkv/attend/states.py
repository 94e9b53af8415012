"""Parts: attention in pieces. Each gives its output and log-sum-exp, and pieces are joined exactly.

`exact` is the specification, plain softmax in the dtype it is given; `block` is the same in float32 or better, and the
portable path of every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keepkv.ops.dtypes import wide

AttentionState = tuple[Tensor, Tensor]  # output [..., R, d_v] and log-sum-exp [..., R], both float32 or better


def exact(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> AttentionState:
    """o = softmax(scale q·k + b) v and its log-sum-exp, for queries [..., R, d], keys [..., n, d], bias [..., 1 or R, n]."""
    logits = scale * (query @ keys.transpose(-1, -2)) + bias
    return logits.softmax(-1) @ values, logits.logsumexp(-1)


def block(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> AttentionState:
    """`exact` in float32 or better throughout, as a bfloat16 logit of 30 is off by up to 0.1; bias may be None.

    ReferenceRows that see nothing give 0 and -inf.
    """
    dtype = wide(query.dtype)
    logits = (query.to(dtype) * scale) @ keys.to(dtype).transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    log_mass = logits.logsumexp(-1)
    share = (logits - log_mass[..., None]).exp_()
    if bias is not None:
        share = share.nan_to_num()  # rows that see nothing
    return share @ values.to(dtype), log_mass


def merge_states(first: AttentionState, second: AttentionState) -> AttentionState:
    """Two parts as one, exactly: o = (M1 o1 + M2 o2) / (M1 + M2), M = exp(log-sum-exp). The algebra of flash-decoding."""
    log_mass = torch.logaddexp(first[1], second[1])
    weight = (second[1] - log_mass).exp().nan_to_num()[..., None]  # nan where neither part sees anything
    return torch.lerp(first[0], second[0], weight), log_mass


def stacked(parts: Sequence[AttentionState], batch: int) -> AttentionState:
    """Parts of every (row, head), rows outermost, as one of [B, H, R]."""
    output, log_mass = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    return output.view(batch, -1, *output.shape[1:]), log_mass.view(batch, -1, *log_mass.shape[1:])


def nothing(query: Tensor, size: int) -> AttentionState:
    """The part of queries [..., R, d] that see no keys, for values of that size: 0 and -inf."""
    output = query.new_zeros(*query.shape[:-1], size, dtype=wide(query.dtype))
    return output, output.new_full(query.shape[:-1], -torch.inf)
