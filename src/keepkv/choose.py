"""Choose: which tokens keep their slots, given scores and counts."""

from __future__ import annotations

import torch
from torch import Tensor


def protect(scores: Tensor, slots: float, sinks: int, recent: int | float) -> Tensor:
    """Scores [..., T] with +inf on the first `sinks` and the last `recent` tokens, which are always kept.

    recent is a number of tokens, or, below 1, a share of the slots. Small budgets shrink both: with n slots per head
    on average at most n/4 sinks and n/2 recent tokens (all of n when recent is a share: it then belongs to the method).
    """
    tokens = scores.shape[-1]
    sinks = min(sinks, int(slots) // 4)
    last = min(int(slots) - sinks, int(recent * slots)) if recent < 1 else min(int(recent), int(slots) // 2)
    token = torch.arange(tokens, device=scores.device)
    return scores.masked_fill((token < sinks) | (token >= tokens - last), torch.inf)


def pin(scores: Tensor, peaks: Tensor, count: int) -> Tensor:
    """Scores [L, H, T] with +inf on the `count` largest peaks of all layers and heads: what must be there to be recalled."""
    flat = scores.flatten().index_fill(0, peaks.flatten().topk(count).indices, torch.inf)
    return flat.view_as(scores)


def best(scores: Tensor, count: int) -> Tensor:
    """The `count` best tokens of one head, ascending int64 [count]. scores [T]. Ties: the earliest tokens win."""
    order = scores.argsort(descending=True, stable=True)
    return order[:count].sort().values
