"""L2 norm: the keys of smallest norm. arXiv 2406.11430."""

from __future__ import annotations

from torch import Tensor
from torch.linalg import vector_norm

from keepkv.methods.base import Method
from keepkv.types import Observation


def small_keys(observation: Observation) -> Tensor:
    """-||k_i||_2: keys of small norm get much attention. Devoto et al., arXiv 2406.11430."""
    norm: Tensor = vector_norm(observation.keys.float(), dim=-1)
    return -norm


METHODS = (
    Method(
        name="knorm",
        summary="the keys of smallest norm",
        paper="L2 norm, arXiv 2406.11430",
        score=small_keys,
        sinks=0,
        recent=0,
        cost="one pass over the keys",
        good="half the cache, with the cheapest score there is",
        bad="small budgets; models that normalize their keys",
    ),
)
