"""Expected Attention: attention expected from Gaussian future queries. arXiv 2510.00636."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from keepkv.methods.base import Method
from keepkv.observe.references import FUTURE
from keepkv.ops.softmax import shares
from keepkv.types import Observation


def expected_attention(observation: Observation, sinks: int = 4) -> Tensor:
    """mean over the group of softmax_i(k_i·R̄μ/sqrt d + k_i R̄ΣR̄ᵀ k_i/(2d)) · ||v_i||. Expected Attention, arXiv 2510.00636.

    μ and Σ are the mean and covariance of the text's queries without their rotation, and R̄ is the mean rotation over the next
    512 positions. The exponent is the logarithm of the mean of exp(q·k) for a Gaussian q. The first 4 tokens, which are always
    kept, are left out of statistics and softmax, as in the authors' code.
    """
    positions, rotation = observation.query_positions, observation.rotation
    plain = rotation.rotate(observation.queries.float(), -positions)[:, :, positions >= sinks] * observation.scale
    mean = plain.mean(2)  # [H, G, d]
    centered = plain - mean[:, :, None]
    covariance = centered.transpose(-1, -2) @ centered / max(1, plain.shape[2])  # [H, G, d, d]
    tokens = observation.tokens
    angle = rotation.angles(torch.arange(tokens, tokens + FUTURE, device=positions.device))
    cos, sin = angle.cos().mean(0).float(), angle.sin().mean(0).float()
    mean = rotation.turn(mean, cos, sin)
    covariance = rotation.turn(rotation.turn(covariance, cos, sin).transpose(-1, -2), cos, sin)
    keys = observation.keys.float()
    logits = mean @ keys.transpose(-1, -2) + ((keys[:, None] @ covariance) * keys[:, None]).sum(-1) / 2
    if observation.bias is not None:
        logits += observation.bias[:, None]
    logits = logits.masked_fill((observation.positions < sinks)[:, None], -torch.inf)
    value_norm: Tensor = vector_norm(observation.values.float(), dim=-1)
    sinks_of_layer = observation.softmax.of_groups(observation.heads)
    return shares(logits, sinks_of_layer).nan_to_num_().mean(1) * value_norm


METHODS = (
    Method(
        name="expected",
        summary="expected attention of Gaussian future queries × value norm",
        paper="Expected Attention, arXiv 2510.00636",
        score=expected_attention,
        recent=0,
        cost="a d × d form for every token and query head",
        good="questions that come after the compression, at moderate budgets",
        bad="heads whose queries are not Gaussian",
    ),
)
