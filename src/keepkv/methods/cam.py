"""CaM: values of dropped tokens spread over those that follow. ICML 2024."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps

import torch
from torch import Tensor

from keepkv import score
from keepkv.merge import merged
from keepkv.merge.merged import Merged
from keepkv.methods.base import Method
from keepkv.ops.sampling import priority
from keepkv.types import Choice, Observation


def spread_values(values: Tensor, kept: Tensor, mass: Tensor, chance: Tensor, present: Tensor, spread: int = 32) -> Tensor:
    """The values, after some of the dropped ones were spread over the entries that follow them. CaM, ICML 2024.

    A dropped value v_i is spread with probability min(1, a_i / mean of a over the next m = 32 entries), where a is the
    attention received: v_i / m is added to each of these. Entries are taken one after the other, oldest first, as if each had
    been dropped when its turn came. All at once would pile up on the few that stay. `docs/theory.md 8.1`.

    Args:
        values: [T, d_v].
        kept: int64 [n].
        mass: a, [T].
        chance: [T], uniform in [0, 1): it decides.
        present: bool [T], which entries are real.
        spread: m.
    """
    count = len(values)
    values = values.clone()
    gone = present.clone()
    gone[kept] = False
    summed = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    first = torch.arange(1, count + 1, device=mass.device)
    last = (first + spread).clamp(max=count)
    mean = (summed[last] - summed[first]) / (last - first).clamp(min=1)
    drawn = gone & (chance * mean < mass) & (last > first)
    for index in drawn.nonzero().flatten().tolist():
        values[index + 1 : index + 1 + spread] += values[index] / min(spread, count - index - 1)
    return values


@wraps(spread_values)
def followers(observation: Observation, choices: Sequence[Choice]) -> list[Merged]:
    assert observation.column_mass is not None, "the method table asks for column_mass"
    results = []
    for head, choice in enumerate(choices):
        seed = (observation.seed * 1_000 + observation.layer) * 1_000 + head
        chance = priority(observation.positions[head], seed).float() / 2**31
        mass, present = observation.column_mass[head], observation.present[head]
        values = spread_values(observation.values[head].float(), choice.kept, mass, chance, present)
        results.append(merged.evict(observation.keys[head], values, choice.kept, observation.head_bias(head)))
    return results


METHODS = (
    Method(
        name="cam",
        summary="StreamingLLM's tokens, dropped values spread at random over the 32 that follow",
        paper="CaM, ICML 2024",
        score=score.recency,
        recent=0,
        merge=followers,
        column_mass=True,
        cost="all attention summed once more while reading, and a loop over the dropped tokens",
        good="a little more of what has just left the window",
        bad="what left it long ago; it depends on chance (seed)",
    ),
)
