"""DefensiveKV: the worst case over the window's queries instead of their mean. arXiv 2510.13334."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from keepkv import allot, score
from keepkv.methods.base import Method
from keepkv.observe.references import window_shares
from keepkv.types import Observation


def defensive(observation: Observation, window: int = 32, kernel: int = 5, first: float = 0.9) -> Tensor:
    """The risk of dropping token i: max(s_i, mean s) n_i, s_i the largest of its shares over window and group. [H, T].

    The shares a are those that the last 32 queries give to older tokens, after a moving mean over 5 neighbors that keeps each
    query's sum:

        s_i  = max over the group and the window of pool(a)_i · sum(a) / sum(pool(a))
        risk = max(s_i, mean_j s_j) · n_i          n_i = ||W_O v_i||_1, mean over the group, over its sum over tokens

    First come the tokens that make up the largest .9 - w of a head's attention, at most as many as a head has slots beyond the
    window; w is the window's own share, and attention is the mean over window and group. They get the best risk of the layer,
    and the window stays. DefensiveKV, arXiv 2510.13334, algorithms 1 and 2; the first stage and n are CriticalKV's, arXiv
    2502.03805.

    Where the authors' code differs: its n is divided by the sum over the heads of the layer, while the paper takes out what
    layers differ in; here that is the sum over tokens. And its w is the share of the 32 tokens before the window.

    Args:
        observation: What the layer showed.
        window: Queries that are looked at.
        kernel: Entries of the moving mean.
        first: See above.

    Raises:
        ModelError: if the weights of the model cannot be read.
    """
    share = window_shares(observation, window)
    newest = observation.positions >= observation.tokens - min(window, observation.queries.shape[2])
    before = observation.entries - int(newest.all(0).sum())
    risk = torch.full(share[:, 0, 0].shape, torch.inf, device=share.device)
    if before <= 0:
        return risk
    older, present = share[..., :before], observation.present[:, :before]
    pooled = avg_pool1d(older.flatten(0, 1), kernel, 1, kernel // 2).view_as(older)
    pooled = pooled * (older.sum(-1) / pooled.sum(-1).clamp(min=1e-30))[..., None]
    worst = pooled.amax((1, 2)).where(present, 0)
    worst = torch.maximum(worst, worst.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1))
    size = score.projected_norm(observation, "defensivekv")[:, :before]
    size = size.where(present, 0)
    own = worst * size / size.sum(1, keepdim=True).clamp(min=1e-30)

    attention = older.mean((1, 2))
    attention = attention / attention.sum(1, keepdim=True).clamp(min=1e-30)
    threshold = first - float(share[..., before:].sum(-1).mean())
    best = attention.sort(dim=1, descending=True)
    count = (best.values.cumsum(1) < threshold).sum(1)
    if observation.slots is not None:
        count = count.clamp(max=max(0, int(observation.slots) - window))
    for head, number in enumerate(count.tolist()):
        own[head, best.indices[head, :number]] = torch.inf
    risk[:, :before] = own.where(own.isfinite(), own[own.isfinite()].amax() if own.isfinite().any() else 0)
    return risk


METHODS = (
    Method(
        name="defensivekv",
        summary="what any one of the last 32 queries attends to × value norm, shared within a layer",
        paper="DefensiveKV, arXiv 2510.13334",
        score=defensive,
        allot=partial(allot.within_layers, floor=0.0),
        sinks=0,
        needs_projection=True,
        cost="32 queries' attention, and every value through the output projection",
        good="a question at the end of the prompt, and tokens that only one of its words asks for",
        bad="questions that come after the compression",
    ),
    Method(
        name="layer-defensivekv",
        summary="what any one of the last 32 queries attends to × value norm, over all layers and heads",
        paper="Layer-DefensiveKV, arXiv 2510.13334",
        score=defensive,
        allot=partial(allot.everywhere, floor=0.0),
        sinks=0,
        needs_projection=True,
        cost="32 queries' attention, and every value through the output projection",
        good="a question at the end of the prompt, where layers differ",
        bad="questions that come after the compression",
    ),
)
