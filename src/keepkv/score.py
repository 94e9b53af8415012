"""Score: how much each entry matters. Every function maps an Observation to float32 [H, T]; larger is better.

Entries that only fill up a shorter head (bias -inf) may get anything: `compress` passes over them. A score that only one method
uses is in that method's file.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import avg_pool1d

from keepkv.errors import ModelError
from keepkv.observe.references import window_shares
from keepkv.types import Observation


def recency(observation: Observation) -> Tensor:
    """The position itself: the newest tokens win. StreamingLLM, arXiv 2309.17453."""
    return observation.positions.float()


def accumulated(observation: Observation) -> Tensor:
    """a_i = sum over all queries so far of their attention on i, mean over the group. H2O, arXiv 2306.14048, section 4."""
    assert observation.column_mass is not None, "the method table asks for column_mass"
    return observation.column_mass


def pooled_window(observation: Observation, window: int = 32, kernel: int = 5) -> Tensor:
    """Mean softmax share over the last 32 queries, then a moving mean over 5 neighbors; the window itself is kept.

    The query heads of a group are averaged after the softmax. Beyond the ends the moving mean counts zeros, as in the authors'
    code. SnapKV, arXiv 2404.14469, section 4.

    Args:
        observation: What the layer showed.
        window: Queries that are looked at.
        kernel: Entries of the moving mean.

    Returns:
        [H, T], +inf for the tokens of the window.
    """
    share = window_shares(observation, window).mean((1, 2))
    newest = observation.positions >= observation.tokens - min(window, observation.queries.shape[2])
    before = observation.entries - int(newest.all(0).sum())
    score = torch.full_like(share, torch.inf)
    if before > 0:
        score[:, :before] = avg_pool1d(share[:, :before], kernel, 1, kernel // 2)
    return score


def rising_window(observation: Observation, window: int) -> Tensor:
    """Sum over the last `window` queries of their shares, with weights rising from 1 to 1.2; per query head, [H, G, T].

    PyramidInfer, arXiv 2405.12532; computed for 64 queries at a time.
    """
    heads, group, count, _ = observation.queries.shape
    window = min(window, count)
    weight = torch.linspace(1, 1.2, window, device=observation.keys.device)
    total = observation.keys.new_zeros(heads, group, observation.entries, dtype=torch.float32)
    for lo in range(count - window, count, 64):
        piece = replace(
            observation,
            queries=observation.queries[:, :, lo : lo + 64],
            query_positions=observation.query_positions[lo : lo + 64],
        )
        share = window_shares(piece, 64).nan_to_num_()
        first = lo - count + window
        total += torch.einsum("hgwt,w->hgt", share, weight[first : first + share.shape[2]])
    return total


def projected_norm(observation: Observation, method: str) -> Tensor:
    """n_i = sum over the group of ||W_O v_i||_1, how large an entry's value is in the layer's output, [H, T].

    W_O is the part of the output projection that a query head's output goes through. CriticalKV, arXiv 2502.03805, algorithm 1.

    Args:
        observation: What the layer showed.
        method: Who asks, for the error.

    Raises:
        ModelError: if the weights of the model cannot be read.
    """
    if observation.projection is None:
        raise ModelError(f"{method} needs the output projection of every layer, and this model's weights cannot be read")
    sizes = torch.zeros(observation.keys.shape[:2], device=observation.keys.device)
    for size, values, projections in zip(sizes, observation.values.float(), observation.projection, strict=True):
        for weight in projections:  # [d_v, D]
            size += torch.cat([(piece @ weight.float()).abs().sum(1) for piece in torch.split(values, 1024)])
    return sizes


def output_change(observation: Observation) -> Tensor:
    """sqrt(rms_share² + repeat_share²) × ||v_i - mean v||: how much the output would change without entry i.

    An entry matters if the reference rows need it or the repetition does. The mean over values counts votes.
    `docs/theory.md 5.1`; the rms share is Attention Matching's, arXiv 2602.16284, section 3.
    """
    references = observation.references
    assert references is not None, "the method table names references"
    values = observation.values.float()
    mean = values.mean(1, keepdim=True)
    if observation.bias is not None:
        mean = observation.bias.softmax(1)[:, None] @ values
    distance: Tensor = vector_norm(values - mean, dim=-1)
    return references.rms_share.hypot(references.repeat_share) * distance
