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
    """Values [T, d_v] after each dropped one was, or was not, spread over the entries that follow. CaM, ICML 2024, SYSTEMS 6.1.

    One entry after the other, oldest first, as if each had been dropped when its turn came: with probability
    p = min(1, a_i / mean of a over the m = 32 next), a [T] the attention received, v_i / m is added to each of them. chance
    [T], uniform in [0, 1), decides. Applied to all dropped entries at once it would pile up on the few that stay.
    """
    count = len(values)
    values, gone = values.clone(), present.clone()
    gone[kept] = False
    held = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    first = torch.arange(1, count + 1, device=mass.device)
    last = (first + spread).clamp(max=count)
    following = (held[last] - held[first]) / (last - first).clamp(min=1)
    lucky = gone & (chance * following < mass) & (last > first)
    for index in lucky.nonzero().flatten().tolist():
        values[index + 1 : index + 1 + spread] += values[index] / min(spread, count - index - 1)
    return values


@wraps(spread_values)
def followers(seen: Observation, choices: Sequence[Choice]) -> list[Merged]:
    assert seen.column_mass is not None, "the method table asks for column_mass"
    made = []
    for h, choice in enumerate(choices):
        chance = priority(seen.positions[h], (seen.seed * 1_000 + seen.layer) * 1_000 + h).float() / 2**31
        values = spread_values(seen.values[h].float(), choice.kept, seen.column_mass[h], chance, seen.present[h])
        made.append(merged.evict(seen.keys[h], values, choice.kept, seen.head_bias(h)))
    return made


METHODS = (
    Method(
        "cam",
        "StreamingLLM's tokens, dropped values spread at random over the 32 that follow",
        "CaM, ICML 2024",
        score.recency,
        recent=0,
        merge=followers,
        column_mass=True,
        cost="a loop over the dropped tokens",
        good="a little more of what just left the window",
        bad="what left it long ago; it depends on chance (seed)",
    ),
)
