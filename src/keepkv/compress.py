"""The way of the data: observe -> score -> allot -> choose -> merge -> slots, for one sequence, all layers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from keepkv import allot
from keepkv.choose import protect
from keepkv.errors import BudgetError
from keepkv.merge import Merged
from keepkv.methods import Method
from keepkv.types import Observation, Plan, Slots

Progress = Callable[[int, int], None]  # called with (steps done, steps in all)


@dataclass(frozen=True)
class Compressed:
    """One sequence, compressed: the plan, one Slots per layer, and per layer and head what the merge reported."""

    plan: Plan
    slots: tuple[Slots, ...]
    merged: tuple[tuple[Merged, ...], ...]


def compress(
    observations: Sequence[Observation], method: Method, total: int, progress: Progress = lambda done, of: None
) -> Compressed:
    """Compresses the observed layers of one sequence to `total` slots over all layers and heads.

    Raises BudgetError if the tokens that must stay (`Observation.keep`) do not fit into every head's slots.
    """
    steps = iter(range(1, len(observations) * (3 if method.trial else 2) + 1))

    def step() -> None:
        progress(next(steps), len(observations) * (3 if method.trial else 2))

    seen, scores = [], []
    for observation in observations:
        if method.reference:
            observation = replace(observation, reference=method.reference(observation))
        seen.append(observation)
        scores.append(method.score(observation))
        step()
    layered = torch.stack(scores)
    if (keep := seen[0].keep) is not None:
        layered = layered.masked_fill(keep, torch.inf)
    pinned = 0 if keep is None else int(keep.sum())

    heads = layered.shape[0] * layered.shape[1]
    _check_room(pinned, total // heads)
    guarded, counts = _allotted(layered, method, total, pinned)
    _check_room(pinned, min(map(min, counts)))
    if method.trial:
        small = min(total, (method.trial + pinned) * heads)
        tried_scores, tried = _allotted(layered, method, small, pinned)
        errors = []
        for observation, score, slots in zip(seen, tried_scores, tried, strict=True):
            errors.append([head.error for head in method.merge(observation, method.choose(observation, score, slots))])
            step()
        counts = allot.by_need(counts, tried, errors, seen[0].tokens, _most_fixed(guarded))

    kept: list[tuple[Tensor, ...]] = []
    merged: list[tuple[Merged, ...]] = []
    parts: list[Slots] = []
    for layer, observation in enumerate(seen):
        kept.append(tuple(method.choose(observation, guarded[layer], counts[layer])))
        merged.append(tuple(method.merge(observation, kept[-1])))
        parts.append(_flat(observation, kept[-1], merged[-1]))
        seen[layer] = observations[layer]  # its reference is not needed any more
        step()
    return Compressed(Plan(tuple(kept)), tuple(parts), tuple(merged))


def _allotted(scores: Tensor, method: Method, total: int, pinned: int) -> tuple[Tensor, list[list[int]]]:
    """Scores [L, H, T] with what is always kept at +inf, and the slots of every layer and head.

    Sinks and recents yield where they and the tokens that a user keeps do not fit together.
    """
    guarded = protect(scores, total / (scores.shape[0] * scores.shape[1]), method.sinks, method.recent)
    counts = method.allot(guarded, total)
    if pinned and _most_fixed(guarded) > min(map(min, counts)):
        return scores, method.allot(scores, total)
    return guarded, counts


def _check_room(pinned: int, slots: int) -> None:
    if pinned > slots:
        raise BudgetError(f"{pinned} tokens must stay in every head, but there are only {slots} slots: give a larger budget")


def _most_fixed(scores: Tensor) -> int:
    """Tokens of a head that keep their slots whatever happens."""
    return int(scores.isposinf().sum(-1).max())


def _flat(observation: Observation, kept: Sequence[Tensor], merged: Sequence[Merged]) -> Slots:
    return Slots(
        keys=torch.cat([head.keys for head in merged]).to(observation.keys.dtype),
        values=torch.cat([head.values for head in merged]).to(observation.values.dtype),
        bias=torch.cat([head.bias for head in merged]).float(),
        positions=torch.cat(list(kept)).int(),
        offsets=(0, *accumulate(len(head) for head in kept)),
    )
