"""R-KV: important and not redundant tokens. arXiv 2505.24133."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from keepkv.methods.base import Method
from keepkv.observe.references import window_logits
from keepkv.types import Observation


def joint(observation: Observation, window: int = 8, kernel: int = 7, weight: float = 0.1, similar: float = 0.5) -> Tensor:
    """λ I_i - (1 - λ) R_i, importance less redundancy, λ = .1; the last 8 tokens are kept. R-KV, arXiv 2505.24133.

    I: softmax over the older tokens of the logits of the last 8 queries, the group's largest; mean over queries; maximum
    over 7 neighbours. R: softmax_i of the mean over j of cos(k_j, k_i), where for each j the newest i with a cosine above .5
    counts 0, so that of equal tokens the last one stays.
    """
    newest = observation.positions >= observation.tokens - min(window, observation.queries.shape[2])
    logits = window_logits(observation, window).amax(1).masked_fill(newest[:, None], -torch.inf)
    share = logits.softmax(-1).nan_to_num_().mean(1)
    important = max_pool1d(share, kernel, 1, kernel // 2)
    unit = normalize(observation.keys.float(), dim=-1).masked_fill(~observation.present[..., None], 0)
    total, place = torch.zeros_like(share), torch.arange(unit.shape[1], device=unit.device)
    for lo in range(0, unit.shape[1], 512):
        near = unit[:, lo : lo + 512] @ unit.transpose(-1, -2)
        near[:, place[: near.shape[1]], place[lo : lo + 512]] = 0
        latest = torch.where(near > similar, place, -1).amax(-1, keepdim=True)
        exempt = near.gather(-1, latest.clamp(min=0)).masked_fill(latest < 0, 0)
        total += near.sum(1).scatter_add(-1, latest.clamp(min=0)[..., 0], -exempt[..., 0])
    alike = total / observation.present.sum(1, keepdim=True)
    redundant = alike.masked_fill(~observation.present, -torch.inf).softmax(-1)
    return (weight * important - (1 - weight) * redundant).masked_fill(newest, torch.inf)


METHODS = (
    Method(
        "r-kv",
        "important and not redundant tokens, and the last 8",
        "R-KV, arXiv 2505.24133",
        joint,
        sinks=0,
        recent=8,
        cost="the cosines of all pairs of keys",
        good="long reasoning that repeats itself (period=128)",
        bad="prompts: 8 queries decide what is important",
    ),
)
