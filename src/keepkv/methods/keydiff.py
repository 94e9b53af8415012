"""KeyDiff: the keys most unlike the others. arXiv 2504.15364."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from keepkv.methods.base import Method
from keepkv.types import Observation


def distinct_keys(observation: Observation) -> Tensor:
    """-cos(k_i, mean of all k_j / ||k_j||) in every KV head: keys unlike the others. KeyDiff, arXiv 2504.15364, equation 3.

    It needs no query. Keys are taken after RoPE.
    """
    unit = normalize(observation.keys.float(), dim=-1).masked_fill(~observation.present[..., None], 0)
    return -(unit @ normalize(unit.sum(1), dim=-1)[..., None])[..., 0]


METHODS = (
    Method(
        name="keydiff",
        summary="the keys most unlike the mean key",
        paper="KeyDiff, arXiv 2504.15364",
        score=distinct_keys,
        sinks=0,
        recent=0,
        cost="one pass over the keys",
        good="reading in chunks under a fixed limit, without any query",
        bad="what is asked for but not unusual",
    ),
)
