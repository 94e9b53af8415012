"""The way of the data: observe -> score -> allot -> choose -> merge -> slots, for one sequence, all layers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from keepkv.choose import protect
from keepkv.errors import BudgetError
from keepkv.merge import Merged
from keepkv.methods import Method
from keepkv.types import Observation, Plan, Slots

Progress = Callable[[int, int], None]  # called with (steps done, steps in all), three per layer


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
    steps = 3 * len(observations)
    seen, scores = [], []
    for layer, observation in enumerate(observations):
        if method.reference:
            observation = replace(observation, reference=method.reference(observation))
        seen.append(observation)
        scores.append(method.score(observation))
        progress(layer + 1, steps)

    average = total / sum(observation.heads for observation in seen)
    guarded = protect(torch.stack(scores), average, method.sinks, method.recent)
    if (keep := observations[0].keep) is not None:
        guarded = guarded.masked_fill(keep, torch.inf)
    counts = method.allot(guarded, total)
    if keep is not None and int(keep.sum()) > min(map(min, counts)):
        raise BudgetError(f"{int(keep.sum())} tokens must stay in every head, but some head gets {min(map(min, counts))} slots")
    chosen = []
    for layer, observation in enumerate(seen):
        chosen.append(tuple(method.choose(observation, guarded[layer], counts[layer])))
        progress(len(seen) + layer + 1, steps)
    plan = Plan(tuple(chosen))

    merged, slots = [], []
    for layer, (observation, kept) in enumerate(zip(seen, plan.kept, strict=True)):
        merged.append(tuple(method.merge(observation, kept)))
        slots.append(_flat(observation, kept, merged[-1]))
        seen[layer] = observations[layer]  # its reference is not needed any more
        progress(2 * len(seen) + layer + 1, steps)
    return Compressed(plan, tuple(slots), tuple(merged))


def _flat(observation: Observation, kept: Sequence[torch.Tensor], merged: Sequence[Merged]) -> Slots:
    return Slots(
        keys=torch.cat([head.keys for head in merged]).to(observation.keys.dtype),
        values=torch.cat([head.values for head in merged]).to(observation.values.dtype),
        bias=torch.cat([head.bias for head in merged]).float(),
        positions=torch.cat(list(kept)).int(),
        offsets=(0, *accumulate(len(head) for head in kept)),
    )
