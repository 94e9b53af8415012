"""KeepKV: electoral votes and ZIP merging, as in the paper, as in its code, and without the pole. arXiv 2504.09936."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv import allot
from keepkv.merge.merged import Merged
from keepkv.merge.per_head import by_similarity
from keepkv.merge.similarity import Groups, nearest_kept
from keepkv.methods.base import Method
from keepkv.observe.references import window_logits
from keepkv.score import rising_window
from keepkv.types import Observation


def moving_average(observation: Observation, window: int = 32, alpha: float = 0.9) -> Tensor:
    """ln s_i, where s_i is the exponential moving average over the last w queries of exp(q·k_i/sqrt d).

    s_i = sum_j (1-α) α^(w-1-j) mean_g exp(l_gji) / (the weight that saw i), computed in logarithms. The paper divides by
    1 - α^t, which is wrong for a truncated window, and states neither α nor w: .9 and 32 are ours. KeepKV, arXiv 2504.09936,
    section on the EMA score; `docs/theory.md 3.1`.
    """
    return _log_mean(observation, window, alpha)


def window_mean(observation: Observation, window: int = 32) -> Tensor:
    """ln s_i, where s_i is the plain mean over the last w queries that saw i of exp(q·k_i/sqrt d). KeepKV's code.

    `docs/theory.md 2.7`.
    """
    return _log_mean(observation, window, 1.0)


def _log_mean(observation: Observation, window: int, alpha: float) -> Tensor:
    """The logarithm of the mean over group and window of exp(logit), with weights α^age, of the queries that saw an entry."""
    logits = window_logits(observation, window, voted=False)
    age = torch.arange(logits.shape[2] - 1, -1, -1, device=logits.device, dtype=torch.float32)
    log_weight = (age * torch.tensor(alpha).log())[:, None].expand(len(logits), -1, logits.shape[3])
    log_weight = log_weight.masked_fill(logits[:, 0].isneginf(), -torch.inf)  # [H, w, T]
    total = log_weight.logsumexp(1) + torch.tensor(float(logits.shape[1])).log()
    mean = (logits + log_weight[:, None]).logsumexp((1, 2)) - total
    return mean.nan_to_num_(nan=-torch.inf, neginf=-torch.inf)


def weighted_window(observation: Observation, window: int = 32) -> Tensor:
    """Sum of the last 32 queries' shares, with weights that rise from 1 to 1.2 for newer queries. KeepKV's code.

    `docs/theory.md 2.7`.
    """
    return rising_window(observation, window).mean(1)


def zip_merge(
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    log_score: Tensor,
    threshold: float = 0.8,
    bias: Tensor | None = None,
    verbatim: Tensor | None = None,
) -> Merged:
    """ZIP merging with electoral votes, for sets. KeepKV, arXiv 2504.09936, equation 7; `docs/theory.md 2.3`.

    For the entries i that merge into slot r, with votes p_i and predicted scores s_i:

        w_i = p_i s_i    W = sum w_i    P = sum p_i    m_i = p_i / P    π_i = w_i / W
        v_r = sum π_i v_i    k_r = λ sum π_i k_i    λ = ln(W/P) / sum π_i ln s_i

    The vote is P. So P exp(q·k_r) = W for the query that gave s, and its output does not change.

    Guard: λ has a pole and can turn negative. Where |sum π_i ln s_i| < max(2 KL(π||m), .001), the key is that of
    `convex_exact_merge` instead, which meets the same condition. So λ is within [1/2, 3/2]. `docs/theory.md 2.5`.

    Args:
        keys: [T, d].
        values: [T, d_v].
        kept: int64 [n], the entries that keep a slot. Others join the most similar one of them, or are dropped.
        log_score: ln s, [T].
        threshold: The cosine that the similarity must exceed.
        bias: [T], the logarithm of the votes that the entries have; or None.
        verbatim: bool [T], entries that nothing may be merged into; or None.
    """
    sets = Scored(keys, values, kept, log_score, threshold, bias, verbatim)
    divergence = sets.pi_level - sets.log_mean  # KL(π||m) >= 0
    safe = sets.pi_level.abs() >= (2 * divergence).clamp(min=1e-3)  # false for NaN, too
    scale = sets.log_mean / sets.pi_level  # λ
    exact = sets.groups.mean(keys, sets.exact_weights())
    merged = torch.where(safe[:, None], scale[:, None] * sets.groups.mean(keys, sets.pi), exact)
    return sets.result(merged, int((~safe & (sets.groups.size > 1)).sum()))


def convex_exact_merge(
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    log_score: Tensor,
    threshold: float = 0.8,
    bias: Tensor | None = None,
    verbatim: Tensor | None = None,
) -> Merged:
    """ZIP's guarantee without its pole: the key stays in the convex hull of its sources. `docs/theory.md 2.6`.

    For the entries i that merge into slot r, with votes p_i and predicted scores s_i:

        w_i = p_i s_i    W = sum w_i    P = sum p_i    m_i = p_i / P    π_i = w_i / W
        v_r = sum π_i v_i    k_r = sum θ_i k_i    θ = (1-τ) m + τ π    τ = KL(m||π) / (KL(m||π) + KL(π||m))

    The vote is P. So sum θ_i ln s_i = ln(W/P) exactly, and P exp(q·k_r) = W for the query that gave s. Arguments as in
    `zip_merge`.
    """
    sets = Scored(keys, values, kept, log_score, threshold, bias, verbatim)
    return sets.result(sets.groups.mean(keys, sets.exact_weights()), 0)


def mean_merge(
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    log_score: Tensor,
    threshold: float = 0.8,
    bias: Tensor | None = None,
    verbatim: Tensor | None = None,
) -> Merged:
    """The authors' code: the weighted mean of the keys without ZIP's λ, and summed votes. `docs/theory.md 2.7`.

    For the entries i that merge into slot r, with votes p_i and predicted scores s_i: w_i = p_i (s_i + ε), ε = 6.1e-5,
    k_r = sum w_i k_i / sum w_i, v_r = sum w_i v_i / sum w_i, and the vote is sum p_i. Arguments as in `zip_merge`.
    """
    epsilon = torch.tensor(6.1e-5, device=keys.device).log()
    sets = Scored(keys, values, kept, torch.logaddexp(log_score, epsilon), threshold, bias, verbatim)
    return sets.result(sets.groups.mean(keys, sets.pi), 0)


class Scored:
    """The entries grouped by the most similar kept key, with each set's votes and the statistics of its scores.

    Arguments as in `zip_merge`. The statistics are those of `docs/theory.md 2.4`: of every slot [n] `log_mass` ln W, `votes` P,
    `log_mean` ln μ = ln(W/P), `pi_level` E_π[ln s] and `level` E_m[ln s]; of every member [m] `pi` π and `share` m.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        kept: Tensor,
        log_score: Tensor,
        threshold: float,
        bias: Tensor | None = None,
        verbatim: Tensor | None = None,
    ) -> None:
        bias = torch.zeros_like(log_score) if bias is None else bias
        target = nearest_kept(keys, kept, threshold, verbatim)
        target = target.masked_fill(bias.isneginf(), -1)  # it only fills up, and stands for nothing
        self.before = (keys, values, bias)
        self.groups = Groups(kept, target)
        member, slot = self.groups.member, self.groups.slot
        score = log_score[member]  # ln s_i
        votes = bias[member].exp()  # p_i
        mass = score + bias[member]  # ln w_i
        top = self.groups.max(mass)
        self.log_mass = self.groups.sum((mass - top[slot]).exp()).log() + top
        self.votes = self.groups.sum(votes)
        self.log_mean = self.log_mass - self.votes.log()
        self.pi = (mass - self.log_mass[slot]).exp()
        self.share = votes / self.votes[slot]
        self.pi_level = self.groups.sum(self.pi * score)
        self.level = self.groups.sum(self.share * score)

    def exact_weights(self) -> Tensor:
        """θ = (1-τ) m + τ π with τ = KL(m||π) / (KL(m||π) + KL(π||m)): then sum θ_i ln s_i = ln μ. `docs/theory.md 2.6`."""
        below = (self.log_mean - self.level).clamp(min=0)  # KL(m||π)
        above = (self.pi_level - self.log_mean).clamp(min=0)  # KL(π||m)
        tau = torch.where(below + above > 1e-12, below / (below + above), 0.5)[self.groups.slot]
        return (1 - tau) * self.share + tau * self.pi

    def result(self, keys: Tensor, fallbacks: int) -> Merged:
        """The merge with these keys [n, d], and values that are weighted by π."""
        return self.groups.result(self.before, keys, self.groups.mean(self.before[1], self.pi), self.votes.log(), fallbacks)


METHODS = (
    Method(
        name="keepkv-paper",
        summary="votes and ZIP merging as in the paper, with its pole guarded",
        paper="KeepKV, arXiv 2504.09936",
        score=moving_average,
        allot=allot.cosine_layers,
        recent=0.8,
        merge=by_similarity(zip_merge, moving_average),
        cost="32 queries' attention, and the cosine of every pair of a dropped and a kept key",
        good="a query with exactly the predicted scores: it loses nothing",
        bad="every other query: kept keys move",
    ),
    Method(
        name="keepkv-code",
        summary="votes and weighted-mean keys, as the authors' code does",
        paper="KeepKV, code of the authors",
        score=weighted_window,
        allot=allot.cosine_layers,
        recent=0.2,
        merge=by_similarity(mean_merge, window_mean),
        cost="as keepkv-paper",
        good="comparing with the published code",
        bad="merged slots: they get too much attention, by the factor e^KL",
    ),
    Method(
        name="keepkv-exact",
        summary="as keepkv-paper, with convex-exact keys: lossless for the predicted scores, without a pole",
        paper="KeepKV, arXiv 2504.09936; docs/theory.md 2.6",
        score=moving_average,
        allot=allot.cosine_layers,
        recent=0.8,
        merge=by_similarity(convex_exact_merge, moving_average),
        cost="as keepkv-paper",
        good="the paper's guarantee, with an error bound",
        bad="other queries: kept keys move",
    ),
)
