"""Reference queries: what questions the compact cache must answer, and how the full cache answers them."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.attention import attend_watched
from keepkv.rope import rotate
from keepkv.types import Observation, Reference

FUTURE = 512  # reference queries are asked from the next FUTURE positions


def future(observation: Observation) -> Reference:
    """The context's own queries, each asked again from a random position after the context (DESIGN section 5).

    Every query of the bank is rotated from its position p to one drawn from [T, T + 512); no causal mask: the whole
    context is past by then. Deterministic in (seed, layer).
    """
    asked = observation.query_positions
    target = observation.tokens + torch.randint(FUTURE, asked.shape, generator=observation.generator)
    queries = rotate(observation.queries.float(), target.to(asked.device) - asked, observation.inv_freq)
    return attend_all(queries.flatten(1, 2) * observation.scale, observation.keys.float(), observation.values.float())


def attend_all(queries: Tensor, keys: Tensor, values: Tensor) -> Reference:
    """Exact attention of queries [H, R, d] (scaled) over keys [H, T, d], values [H, T, d_v]."""
    (outputs, log_z), rms_share = attend_watched(queries, keys, values, "rms")
    return Reference(queries, log_z, outputs, rms_share)
