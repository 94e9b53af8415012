"""The two ends of the scale: every token kept, and tokens drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv import score
from keepkv.methods.base import Method
from keepkv.ops.sampling import priority
from keepkv.types import Observation


def chance(observation: Observation) -> Tensor:
    """A pseudo-random number per position, head, layer and seed: the control that every method must beat.

    A token's number never changes, so that compressing in steps keeps the same sample as compressing once.
    """
    head = torch.arange(observation.heads, device=observation.keys.device)[:, None]
    return priority(observation.positions, (observation.seed * 1_000 + observation.layer) * 1_000 + head).float()


METHODS = (
    Method(
        "full",
        "every token, whatever the budget: the yardstick",
        "",
        score.recency,
        keeps_all=True,
        cost="nothing",
        good="what every other method is compared with",
        bad="saves nothing",
    ),
    Method(
        "random",
        "random tokens, the first 4 and the last 32: the control",
        "",
        chance,
        cost="nothing",
        good="what every method must beat",
        bad="everything else",
    ),
)
