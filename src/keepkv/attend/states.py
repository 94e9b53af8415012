"""Attention states: attention in pieces. Each gives its output and log-sum-exp, and pieces are merged exactly.

`exact` is the specification, plain softmax in the dtype that it is given. `block` is the same in float32 or better, and the
portable way on every device. `docs/theory.md 1.1`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keepkv.ops.dtypes import wide
from keepkv.ops.softmax import PLAIN, Softmax

AttentionState = tuple[Tensor, Tensor]  # output [..., R, d_v] and log-sum-exp [..., R], both float32 or better


def exact(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> AttentionState:
    """o = softmax(scale q·k + b) v and its log-sum-exp, in the dtype that it is given.

    Args:
        query: [..., R, d].
        keys: [..., n, d].
        values: [..., n, d_v].
        bias: [..., 1 or R, n].
        scale: The factor on q·k.
    """
    logits = scale * (query @ keys.transpose(-1, -2)) + bias
    return logits.softmax(-1) @ values, logits.logsumexp(-1)


def block(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float, softmax: Softmax = PLAIN
) -> AttentionState:
    """`exact` in float32 or better throughout, as a bfloat16 logit of 30 is off by up to 0.1; bias may be None.

    Logits may be capped. Sinks are joined to the whole, see `with_sinks`. A row that sees nothing gets 0 and -inf.
    """
    dtype = wide(query.dtype)
    logits = softmax.capped((query.to(dtype) * scale) @ keys.to(dtype).transpose(-1, -2))
    if bias is not None:
        logits = logits + bias
    log_mass = logits.logsumexp(-1)
    share = (logits - log_mass[..., None]).exp_()
    if bias is not None:
        share = share.nan_to_num()  # rows that see nothing
    return share @ values.to(dtype), log_mass


def merge_states(first: AttentionState, second: AttentionState) -> AttentionState:
    """Two states over disjoint entries as one, exactly: o = (M1 o1 + M2 o2) / (M1 + M2), M = exp(log-sum-exp).

    `docs/theory.md 1.1`; the algebra of flash-decoding, the name of FlashInfer, arXiv 2501.01005, section 2.2.
    """
    log_mass = torch.logaddexp(first[1], second[1])
    weight = (second[1] - log_mass).exp().nan_to_num()[..., None]  # nan where neither state sees anything
    return torch.lerp(first[0], second[0], weight), log_mass


def with_sinks(state: AttentionState, sinks: Tensor | None) -> Tensor:
    """The output [B, H, R, d_v] of a state over all entries, once each row's sink [H, R] is joined, which has no value."""
    output, log_mass = state
    return output if sinks is None else output * (log_mass - sinks.to(output.dtype)).sigmoid()[..., None]


def stacked(states: Sequence[AttentionState], batch: int) -> AttentionState:
    """The states of every (row, head), rows of the batch outermost, as one of [B, H, R]."""
    output, log_mass = (torch.stack(tensors) for tensors in zip(*states, strict=True))
    return output.view(batch, -1, *output.shape[1:]), log_mass.view(batch, -1, *log_mass.shape[1:])


def nothing(query: Tensor, size: int) -> AttentionState:
    """The state of queries [..., R, d] that see no keys, for values of that size: 0 and -inf."""
    output = query.new_zeros(*query.shape[:-1], size, dtype=wide(query.dtype))
    return output, output.new_full(query.shape[:-1], -torch.inf)
