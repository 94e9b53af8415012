"""Score: how much each token matters. Every function maps an Observation to float32 [H, T], larger is better.

T entries, of which those that only fill up (bias -inf) may get anything: whoever chooses passes over them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import avg_pool1d, max_pool1d, normalize

from keepkv.draw import priority
from keepkv.reference import FUTURE, window_logits
from keepkv.rope import rotate, turn
from keepkv.types import Observation


def recency(observation: Observation) -> Tensor:
    """The position itself: the newest tokens win. StreamingLLM, arXiv 2309.17453."""
    return observation.positions.float()


def chance(observation: Observation) -> Tensor:
    """A pseudo-random number per position, head, layer and seed: the control that every method must beat.

    A token's number never changes, so that compressing in steps keeps the same sample as compressing once.
    """
    head = torch.arange(observation.heads, device=observation.keys.device)[:, None]
    return priority(observation.positions, (observation.seed * 1_000 + observation.layer) * 1_000 + head).float()


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


def last_query(observation: Observation) -> Tensor:
    """The share that the newest query gives to each token, mean over all heads of the layer. TOVA, arXiv 2401.06104.

    One score for all heads: they keep the same tokens.
    """
    share = window_logits(observation, 1).softmax(-1).mean((0, 1, 2))
    return share.expand(observation.heads, -1)


def small_keys(observation: Observation) -> Tensor:
    """-||k_i||_2: keys of small norm get much attention. Devoto et al., arXiv 2406.11430."""
    norm: Tensor = vector_norm(observation.keys.float(), dim=-1)
    return -norm


def distinct_keys(observation: Observation) -> Tensor:
    """-cos(k_i, mean of all k_j / ||k_j||), for each KV head: keys unlike the others. KeyDiff, arXiv 2504.15364, eq. 3.

    Needs no query. Keys are taken after RoPE.
    """
    unit = normalize(observation.keys.float(), dim=-1).masked_fill(~observation.present[..., None], 0)
    return -(unit @ normalize(unit.sum(1), dim=-1)[..., None])[..., 0]


def asked_again(observation: Observation) -> Tensor:
    """The largest share that a token got, over the group and all queries of a repetition of the text. KVzip, arXiv 2505.23416.

    Each piece of the text is repeated over the full cache, and shares are counted among the first 4 tokens, the piece and its
    repetition (`recall.Repeat`). What came later and was not repeated scores 0.
    """
    assert observation.recall is not None, "the method table has the text repeated"
    return observation.recall


def answered_most(observation: Observation) -> Tensor:
    """sqrt(mean over reference rows of share²): the highest attention keys. Attention Matching, arXiv 2602.16284, section 3."""
    assert observation.reference is not None, "the method table names a reference"
    return observation.reference.rms_share


def newest_fifth(observation: Observation) -> Tensor:
    """Mean over all heads of the shares of the newest fifth of queries, weights from 1 to 1.2. PyramidInfer, 2405.12532.

    One score for all heads: they keep the same tokens. In the paper tokens are dropped while the prompt is read, so that
    later layers never see them; here only the cache shrinks.
    """
    count = int((observation.query_positions >= 0.8 * observation.tokens).sum())
    return _rising(observation, max(1, count)).mean((0, 1)).expand(observation.heads, -1)


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


def expected_attention(observation: Observation, sinks: int = 4) -> Tensor:
    """mean over the group of softmax_i(k_i·R̄μ/sqrt d + k_i R̄ΣR̄ᵀ k_i/(2d)) · ||v_i||. Expected Attention, 2510.00636.

    μ and Σ are the mean and covariance of the context's unrotated queries; R̄ is the mean rotation over the next 512
    positions; the exponent is the log of the mean of exp(q·k) for a Gaussian q. The first 4 tokens, which are always kept, are
    left out of statistics and softmax, as in the authors' code.
    """
    positions, inv_freq, tokens = observation.query_positions, observation.inv_freq, observation.tokens
    plain = rotate(observation.queries.float(), -positions, inv_freq)[:, :, positions >= sinks] * observation.scale
    mean = plain.mean(2)  # [H, G, d]
    centred = plain - mean[:, :, None]
    covariance = centred.transpose(-1, -2) @ centred / max(1, plain.shape[2])  # [H, G, d, d]
    ahead = torch.arange(tokens, tokens + FUTURE, device=inv_freq.device, dtype=torch.float64)
    angle = ahead[:, None] * inv_freq.double()
    cos, sin = angle.cos().mean(0).float(), angle.sin().mean(0).float()
    mean = turn(mean, cos, sin)
    covariance = turn(turn(covariance, cos, sin).transpose(-1, -2), cos, sin)
    keys = observation.keys.float()
    logits = mean @ keys.transpose(-1, -2) + ((keys[:, None] @ covariance) * keys[:, None]).sum(-1) / 2
    if observation.bias is not None:
        logits += observation.bias[:, None]
    logits = logits.masked_fill((observation.positions < sinks)[:, None], -torch.inf)
    loudness: Tensor = vector_norm(observation.values.float(), dim=-1)
    return logits.softmax(-1).nan_to_num_().mean(1) * loudness


def moving_average(observation: Observation, window: int = 32, alpha: float = 0.9) -> Tensor:
    """log s_i, s_i the exponential moving average over the last w queries of exp(q·k_i/sqrt d). KeepKV, section on EMA.

    s_i = sum_j (1-α) α^(w-1-j) mean_g exp(l_gji) / (the weight that saw i). The paper divides by 1 - α^t, which is
    wrong for a truncated window (SYSTEMS 1.5); α and w are not stated there, these are ours. In logs throughout.
    """
    return _log_mean(observation, window, alpha)


def window_mean(observation: Observation, window: int = 32) -> Tensor:
    """log s_i, s_i the plain mean over the last w queries that saw i of exp(q·k_i/sqrt d). KeepKV's code."""
    return _log_mean(observation, window, 1.0)


def _log_mean(observation: Observation, window: int, alpha: float) -> Tensor:
    logits = window_logits(observation, window, voted=False)
    age = torch.arange(logits.shape[2] - 1, -1, -1, device=logits.device, dtype=torch.float32)
    log_weight = (age * torch.tensor(alpha).log())[:, None].expand(len(logits), -1, logits.shape[3])
    log_weight = log_weight.masked_fill(logits[:, 0].isneginf(), -torch.inf)  # [H, w, T]
    total = log_weight.logsumexp(1) + torch.tensor(float(logits.shape[1])).log()
    return ((logits + log_weight[:, None]).logsumexp((1, 2)) - total).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)


def weighted_window(observation: Observation, window: int = 32) -> Tensor:
    """Sum of the last w queries' shares, weights rising from 1 to 1.2 with the query's age falling. KeepKV's code."""
    return _rising(observation, window).mean(1)


def _rising(observation: Observation, window: int) -> Tensor:
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

    To the rms share of the reference rows that of the recall queries is added in squares: who may be asked for either way
    counts for both.
    """
    reference = observation.reference
    assert reference is not None, "the method table names a reference"
    values = observation.values.float()
    mean = values.mean(1, keepdim=True)
    if observation.bias is not None:
        mean = observation.bias.softmax(1)[:, None] @ values
    distance: Tensor = vector_norm(values - mean, dim=-1)
    return reference.rms_share.hypot(reference.recall) * distance
