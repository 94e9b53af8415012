"""CriticalKV: half by attention, half by how much the output may change. arXiv 2502.03805."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keepkv import score
from keepkv.choose import best
from keepkv.methods.base import Method
from keepkv.types import Choice, Observation


def two_stages(
    observation: Observation, scores: Tensor, counts: Sequence[int], first: float = 0.5, lift: float = 1e-4
) -> list[Choice]:
    """Half by score, the rest by (score + 1e-4) × mean over the group of ||W_O v_i||_1.

    Their sum bounds how much the output changes without entry i. W_O is as in `score.projected_norm`. Scores [H, T] are shares
    of attention, +inf for what must stay. CriticalKV, arXiv 2502.03805, algorithm 1.
    """
    sizes = score.projected_norm(observation, "criticalkv")
    choices = []
    for head, count in enumerate(counts):
        own = scores[head]
        chosen_first = best(own, int(first * count))
        second_score = (own + lift) * sizes[head] / observation.queries.shape[1]
        second_score = second_score.masked_fill(own.isneginf(), -torch.inf).scatter(0, chosen_first, torch.inf)
        choices.append(Choice(best(second_score.masked_fill(own.isposinf(), torch.inf), count)))
    return choices


METHODS = (
    Method(
        name="criticalkv",
        summary="half by SnapKV's score, half by what leaving a token out may change",
        paper="CriticalKV, arXiv 2502.03805",
        score=score.pooled_window,
        sinks=0,
        choose=two_stages,
        needs_projection=True,
        cost="32 queries' attention, and every value through the output projection",
        good="a question at the end of the prompt, a little better than SnapKV",
        bad="questions that come after the compression",
    ),
)
