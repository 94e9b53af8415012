"""A layer as the methods see it."""

from __future__ import annotations

from dataclasses import replace

import torch

from helpers import randn64
from keepkv.ops.rope import Rotation
from keepkv.types import Observation

INF = torch.inf
ROTATION = Rotation.halves(1 / 100 ** (torch.arange(8) / 8))


def seen(count: int = 60, heads: int = 2, **more: object) -> Observation:
    """A layer that read `count` tokens: two KV heads of three query heads each, head size 16."""
    keys, values = randn64(heads, count, 16).float(), randn64(heads, count, 16, seed=1).float()
    queries = 2 * randn64(heads, 3, count, 16, seed=2).float()
    return replace(Observation(keys, values, queries, torch.arange(count), ROTATION, 0.25), **more)


def shares(observation: Observation, window: int) -> torch.Tensor:
    """Causal softmax shares [H, G, w, T] of the last queries, float64."""
    queries, keys = observation.queries.double()[:, :, -window:], observation.keys.double()
    logits = observation.scale * queries @ keys[:, None].transpose(-1, -2)
    count = keys.shape[1]
    hidden = torch.ones(count, count, dtype=torch.bool).triu(1)[-window:]
    return logits.masked_fill(hidden, -INF).softmax(-1)
