"""R-KV: important and not redundant tokens. arXiv 2505.24133."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from keepkv.methods.base import Method
from keepkv.observe.references import window_logits
from keepkv.types import Observation


def joint(observation: Observation, window: int = 8, kernel: int = 7, weight: float = 0.1, similar: float = 0.5) -> Tensor:
    """λ I_i - (1 - λ) R_i, importance less redundancy, with λ = .1; the last 8 tokens are kept. R-KV, arXiv 2505.24133.

    I is the softmax over the older tokens of the group's largest logits, for each of the last 8 queries; then the mean over
    queries, and the maximum over 7 neighbors. R is the softmax over i of the mean over j of cos(k_j, k_i), where for each j the
    newest i with a cosine above .5 counts 0, so that of equal tokens the last one stays.
    """
    newest = observation.positions >= observation.tokens - min(window, observation.queries.shape[2])
    logits = window_logits(observation, window).amax(1).masked_fill(newest[:, None], -torch.inf)
    share = logits.softmax(-1).nan_to_num_().mean(1)
    important = max_pool1d(share, kernel, 1, kernel // 2)

    # All pairs of keys, 512 rows at a time: no matrix grows with the square of the length.
    unit = normalize(observation.keys.float(), dim=-1).masked_fill(~observation.present[..., None], 0)
    total = torch.zeros_like(share)
    index = torch.arange(unit.shape[1], device=unit.device)
    for lo in range(0, unit.shape[1], 512):
        cosine = unit[:, lo : lo + 512] @ unit.transpose(-1, -2)
        cosine[:, index[: cosine.shape[1]], index[lo : lo + 512]] = 0  # of a key with itself
        # The newest key that each one resembles is not redundant for that: its cosine is taken out of the sum again.
        latest = torch.where(cosine > similar, index, -1).amax(-1, keepdim=True)
        exempt = cosine.gather(-1, latest.clamp(min=0)).masked_fill(latest < 0, 0)
        total += cosine.sum(1).scatter_add(-1, latest.clamp(min=0)[..., 0], -exempt[..., 0])
    mean = total / observation.present.sum(1, keepdim=True)
    redundant = mean.masked_fill(~observation.present, -torch.inf).softmax(-1)
    return (weight * important - (1 - weight) * redundant).masked_fill(newest, torch.inf)


METHODS = (
    Method(
        name="r-kv",
        summary="important and not redundant tokens, and the last 8",
        paper="R-KV, arXiv 2505.24133",
        score=joint,
        sinks=0,
        recent=8,
        cost="the cosines of all pairs of keys",
        good="long reasoning that repeats itself (period=128)",
        bad="prompts: 8 queries decide what is important",
    ),
)
