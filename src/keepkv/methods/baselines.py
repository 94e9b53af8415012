"""The ends of the scale: every token is kept, exactly or quantized, or tokens are drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv import score
from keepkv.methods.base import Method
from keepkv.ops.sampling import priority
from keepkv.types import Observation


def chance(observation: Observation) -> Tensor:
    """A pseudo-random number for every position, head, layer and seed: the control that every method must beat.

    A token's number never changes, so that compressing in steps keeps the same sample as compressing once.
    """
    head = torch.arange(observation.heads, device=observation.keys.device)[:, None]
    return priority(observation.positions, (observation.seed * 1_000 + observation.layer) * 1_000 + head).float()


METHODS = (
    Method(
        name="full",
        summary="every token, whatever the budget: the yardstick",
        paper="",
        score=score.recency,
        keeps_all=True,
        always_exact=True,
        cost="nothing",
        good="comparing every other method with it",
        bad="saving memory: it saves none",
    ),
    Method(
        name="kivi",
        summary="every token, whatever the budget, as the slot dtype stores it: keys by channel, values by vector",
        paper="KIVI, arXiv 2402.02750",
        score=score.recency,
        keeps_all=True,
        cost="nothing but the rounding; the newest tokens are rounded too, where the paper keeps 128 as they are",
        good="everything, at a third of a 16-bit cache in 4 bits",
        bad="smaller caches than its bits give (auto is int4 here): stored as the model computes them, it saves nothing",
    ),
    Method(
        name="random",
        summary="random tokens, the first 4 and the last 32: the control",
        paper="",
        score=chance,
        cost="nothing",
        good="a control that every method must beat",
        bad="everything else",
    ),
)
