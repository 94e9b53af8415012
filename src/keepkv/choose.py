"""Choose: which tokens keep their slots, given scores and counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keepkv.ops import least_squares
from keepkv.ops.ragged import Ragged, groups
from keepkv.types import Choice, Observation


def protect(scores: Tensor, places: Tensor, tokens: int, slots: float, sinks: int, recent: int | float) -> Tensor:
    """Scores [..., T] with +inf on the first `sinks` and the last `recent` of the tokens read, which are always kept.

    places [..., T] are the entries' positions. A score of -inf stays: there is no such entry.
    recent is a number of tokens, or, below 1, a share of the slots. Small budgets shrink both: with n slots per head
    on average at most n/4 sinks and n/2 recent tokens (all of n when recent is a share: it then belongs to the method).
    """
    sinks = min(sinks, int(slots) // 4)
    last = min(int(slots) - sinks, int(recent * slots)) if recent < 1 else min(int(recent), int(slots) // 2)
    return scores.masked_fill(((places < sinks) | (places >= tokens - last)) & ~scores.isneginf(), torch.inf)


def best(scores: Tensor, count: int) -> Tensor:
    """The `count` best tokens of one head, ascending int64 [count]. scores [T]. Ties: the earliest tokens win."""
    order = scores.argsort(descending=True, stable=True)
    return order[:count].sort().values


def top(observation: Observation, scores: Tensor, counts: Sequence[int]) -> list[Choice]:
    """Per KV head its best tokens. scores [H, T]."""
    return [Choice(best(*head)) for head in zip(scores, counts, strict=True)]


MANY = 512  # slots of a head from which on the best are good enough


def eliminate(
    observation: Observation, scores: Tensor, counts: Sequence[int], spare: int = 64, rounds: int = 3, strength: float = 1e-4
) -> list[Choice]:
    """Per KV head, from `spare` more candidates than slots, those whose part nobody else can play (`solve.eliminate`).

    What is to be reached is the output and, as one more column of the same size, the mass of every reference row.
    Heads of more than 512 slots keep their best: hardly worse, and no matrix grows with the length of the text.
    Tokens with a score of +inf stay. scores [H, T].
    """
    chosen: list[Choice] = []
    room = observation.counts
    many = [min(have, count + (spare if count <= MANY else 0)) for count, have in zip(counts, room, strict=True)]
    tokens = [best(*head) for head in zip(scores, many, strict=True)]
    asked = [have if have > count else 0 for have, count in zip(many, counts, strict=True)]  # of heads with a choice
    for heads in groups(len(counts), scores.device, max(asked) * max(max(asked), observation.reference_rows)):
        if not any(asked[heads]):
            chosen += [Choice(kept) for kept in tokens[heads]]
            continue
        candidates = Ragged.of([own[:have] for own, have in zip(tokens[heads], asked[heads], strict=True)])
        rows = observation.rows(heads)
        repeat_share, share = candidates.pick(rows.repeat_share) * candidates.real, rows.on(candidates)
        loud = rows.outputs.square().sum(-1).mean(-1).sqrt()[:, None, None]
        wanted = torch.cat([rows.outputs, loud.expand(-1, share.shape[1], 1)], 2)
        gram, target = least_squares.normal(share, repeat_share, wanted)
        values = candidates.pick(observation.values[heads]).float()
        own = torch.cat([values, loud.expand(-1, values.shape[1], 1)], 2)
        target += share.shape[1] * repeat_share[..., None].square() * own
        must = candidates.pick(scores[heads]).isposinf()
        goal = [count if have else 0 for have, count in zip(asked[heads], counts[heads], strict=True)]
        left = least_squares.eliminate(gram, target, must, asked[heads], goal, rounds, strength)
        order = torch.where(left, candidates.entries, observation.entries).sort(1).values  # what goes comes last
        of_heads = zip(order, tokens[heads], asked[heads], counts[heads], strict=True)
        chosen += [Choice(stay[:count] if have else kept) for stay, kept, have, count in of_heads]
    return chosen


def _shifted(kept: Tensor, target: Tensor, first: int) -> Choice:
    """The choice among all entries, `first` of which only fill up in front."""
    return Choice(kept + first, torch.cat([target.new_full((first,), -1), target]))
