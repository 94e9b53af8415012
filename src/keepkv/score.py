"""Score: how much each token matters. Every function maps an Observation to float32 [H, T], larger is better.

T entries, of which those that only fill up (bias -inf) may get anything: whoever chooses passes over them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import avg_pool1d

from keepkv.observe.references import window_logits
from keepkv.types import Observation


def recency(observation: Observation) -> Tensor:
    """The position itself: the newest tokens win. StreamingLLM, arXiv 2309.17453."""
    return observation.positions.float()


def accumulated(observation: Observation) -> Tensor:
    """a_i = sum over all queries so far of their attention on i, mean over the group. H2O, arXiv 2306.14048, section 4."""
    assert observation.column_mass is not None, "the method table asks for column_mass"
    return observation.column_mass


def pooled_window(observation: Observation, window: int = 32, kernel: int = 5) -> Tensor:
    """Mean softmax share over the last 32 queries, then a moving mean over 5 neighbours; the window itself is kept.

    SnapKV, arXiv 2404.14469, section 4. The group is averaged after the softmax (GQA); beyond the ends the mean counts zeros,
    as in the authors' code.
    """
    share = window_logits(observation, window).softmax(-1).mean((1, 2))
    newest = observation.positions >= observation.tokens - min(window, observation.queries.shape[2])
    before = observation.entries - int(newest.all(0).sum())
    score = torch.full_like(share, torch.inf)
    if before > 0:
        score[:, :before] = avg_pool1d(share[:, :before], kernel, 1, kernel // 2)
    return score


def rising_window(observation: Observation, window: int) -> Tensor:
    """Sum over the last w queries of their shares, weights rising from 1 to 1.2, [H, G, T]; 64 queries at a time."""
    (heads, group, count, _), entries = observation.queries.shape, observation.entries
    window = min(window, count)
    weight = torch.linspace(1, 1.2, window, device=observation.keys.device)
    total = observation.keys.new_zeros(heads, group, entries, dtype=torch.float32)
    for lo in range(count - window, count, 64):
        part = replace(
            observation,
            queries=observation.queries[:, :, lo : lo + 64],
            query_positions=observation.query_positions[lo : lo + 64],
        )
        share = window_logits(part, 64).softmax(-1).nan_to_num_()
        first = lo - count + window
        total += torch.einsum("hgwt,w->hgt", share, weight[first : first + share.shape[2]])
    return total


def output_change(observation: Observation) -> Tensor:
    """rms share × ||v_i - mean v||: how much of the output hangs on token i. DESIGN section 5.

    To the rms share of the reference rows that of the repetition's queries is added in squares: who may be asked for either way
    counts for both.
    """
    references = observation.references
    assert references is not None, "the method table names references"
    values = observation.values.float()
    mean = values.mean(1, keepdim=True)
    if observation.bias is not None:
        mean = observation.bias.softmax(1)[:, None] @ values
    distance: Tensor = vector_norm(values - mean, dim=-1)
    return references.rms_share.hypot(references.repeat_share) * distance
