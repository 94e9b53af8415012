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
        "knorm",
        "the keys of smallest norm",
        "L2 norm, arXiv 2406.11430",
        small_keys,
        sinks=0,
        recent=0,
        cost="one pass over the keys",
        good="the cheapest score there is, at half the cache",
        bad="small budgets; models with norms on the keys",
    ),
)
