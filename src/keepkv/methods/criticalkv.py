"""CriticalKV: half by attention, half by how much the output may change. arXiv 2502.03805."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keepkv import score
from keepkv.choose import best
from keepkv.errors import ModelError
from keepkv.methods.base import Method
from keepkv.types import Choice, Observation


def two_stages(
    observation: Observation, scores: Tensor, counts: Sequence[int], first: float = 0.5, lift: float = 1e-4
) -> list[Choice]:
    """Half by score, the rest by (score + 1e-4) × mean over the group of ||W_O v_i||_1. CriticalKV, arXiv 2502.03805, alg. 1.

    W_O is the part of the output projection that a query head's output goes through; the sum bounds what leaving i out
    changes. scores [H, T] are shares of attention, +inf what must stay.
    """
    if observation.projection is None:
        raise ModelError("criticalkv needs the output projection of every layer, and this model's weights cannot be read")
    chosen = []
    for head, count in enumerate(counts):
        score, values = scores[head], observation.values[head].float()
        loud = torch.zeros_like(score)
        for weight in observation.projection[head]:  # [d_v, D]
            loud += torch.cat([(part @ weight.float()).abs().sum(1) for part in torch.split(values, 1024)])
        early = best(score, int(first * count))
        later = (score + lift) * loud / len(observation.projection[head])
        later = later.masked_fill(score.isneginf(), -torch.inf).scatter(0, early, torch.inf)
        chosen.append(Choice(best(later.masked_fill(score.isposinf(), torch.inf), count)))
    return chosen


METHODS = (
    Method(
        "criticalkv",
        "half by SnapKV's score, half by what leaving a token out may change",
        "CriticalKV, arXiv 2502.03805",
        score.pooled_window,
        sinks=0,
        choose=two_stages,
        cost="every value through the output projection",
        good="SnapKV's cases, a little better",
        bad="questions that come after the compression",
    ),
)
