"""Choose: which tokens keep their slots, given scores and counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from keepkv import solve
from keepkv.types import Observation


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


def best(scores: Tensor, count: int) -> Tensor:
    """The `count` best tokens of one head, ascending int64 [count]. scores [T]. Ties: the earliest tokens win."""
    order = scores.argsort(descending=True, stable=True)
    return order[:count].sort().values


def top(observation: Observation, scores: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Per KV head its best tokens. scores [H, T]."""
    return [best(*head) for head in zip(scores, counts, strict=True)]


def eliminate(
    observation: Observation, scores: Tensor, counts: Sequence[int], spare: int = 64, rounds: int = 3
) -> list[Tensor]:
    """Per KV head, from half as many candidates again as slots (at least 64 more), those whose part nobody else can play.

    Votes w are fitted to all candidates over the reference rows; those that then carry least, w_j × rms share_j ×
    ||v_j - mean v||, are dropped, and the votes are fitted again, three times over.
    Tokens with a score of +inf stay. scores [H, T].
    """
    assert observation.reference is not None, "the method table names a reference"
    chosen = []
    for head, count in enumerate(counts):
        tokens = best(scores[head], min(observation.tokens, count + max(count // 2, spare)))
        if len(tokens) > count:
            values = observation.values[head].float()
            rows = observation.reference.rows(head)
            gram, target = solve.normal(rows.share(observation.keys[head].float(), tokens), rows.recall[tokens])
            weight = gram.diagonal().sqrt() * vector_norm(values[tokens] - values.mean(0), dim=-1)
            weight[scores[head, tokens].isposinf()] = torch.inf
            stay = torch.arange(len(tokens), device=tokens.device)
            for left in range(rounds - 1, -1, -1):
                carried = solve.votes(gram[stay][:, stay], target[stay], steps=50) * weight[stay]
                stay = stay[best(carried, count + (len(tokens) - count) * left // rounds)]
            tokens = tokens[stay]
        chosen.append(tokens)
    return chosen
