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
    return rising_window(observation, window).mean(1)


# --- with votes and predicted scores: KeepKV, arXiv 2504.09936 ---


def zip_merge(
    keys: Tensor, values: Tensor, kept: Tensor, log_score: Tensor, threshold: float = 0.8, bias: Tensor | None = None,
    verbatim: Tensor | None = None,
) -> Merged:  # fmt: skip
    """ZIP merging with electoral votes. KeepKV, arXiv 2504.09936, eq. 7 for sets: for tokens i merged into slot r

    w_i = p_i s_i, W = sum w_i, P = sum p_i, p the votes:  v_r = sum w_i v_i / W,  k_r = λ sum w_i k_i / W,
    λ = ln(W/P) / (sum w_i ln s_i / W), so that for the query that gave s, P exp(q·k_r) = W: its output does not change.
    log_score [T] is ln s.

    Guard (SYSTEMS 4.2): λ has a pole and can turn negative. Where |E_π ln s| < max(2 KL(π||m), 1e-3) or λ is outside
    [1/2, 2], the key is the convex-exact one instead (rule B of SYSTEMS 4.3), which meets the same condition.
    """
    sets = Scored(keys, values, kept, log_score, threshold, bias, verbatim)
    scale = sets.log_mean / sets.pi_level
    spread = sets.pi_level - sets.log_mean  # KL(π||m) >= 0
    unsafe = (sets.pi_level.abs() < (2 * spread).clamp(min=1e-3)) | (scale < 0.5) | (scale > 2) | scale.isnan()
    exact = sets.groups.mean(keys, sets.exact_weights())
    merged = torch.where(unsafe[:, None], exact, scale[:, None] * sets.groups.mean(keys, sets.pi))
    return sets.result(merged, int((unsafe & (sets.groups.size > 1)).sum()))


def convex_exact_merge(
    keys: Tensor, values: Tensor, kept: Tensor, log_score: Tensor, threshold: float = 0.8, bias: Tensor | None = None,
    verbatim: Tensor | None = None,
) -> Merged:  # fmt: skip
    """ZIP's guarantee without its pole: the key stays in the convex hull of its sources. SYSTEMS 4.3, rule B.

    k_r = sum θ_i k_i, θ = (1-τ) m + τ π, m_i = p_i / P, π_i = w_i / W, τ = KL(m||π) / (KL(m||π) + KL(π||m)), w, P and W as in
    `zip_merge`: then sum θ_i ln s_i = ln(W/P) exactly. v_r = sum π_i v_i; the vote is P.
    """
    sets = Scored(keys, values, kept, log_score, threshold, bias, verbatim)
    return sets.result(sets.groups.mean(keys, sets.exact_weights()), 0)


def mean_merge(
    keys: Tensor, values: Tensor, kept: Tensor, log_score: Tensor, threshold: float = 0.8, bias: Tensor | None = None,
    verbatim: Tensor | None = None,
) -> Merged:  # fmt: skip
    """The authors' code: k_r = sum w k / sum w without the ZIP scale, w = s + ε; votes summed. SYSTEMS section 2."""
    epsilon = torch.tensor(6.1e-5, device=keys.device).log()
    sets = Scored(keys, values, kept, torch.logaddexp(log_score, epsilon), threshold, bias, verbatim)
    return sets.result(sets.groups.mean(keys, sets.pi), 0)


class Scored:
    """The tokens grouped by the most similar kept key, with each set's votes and statistics of its scores."""

    def __init__(
        self, keys: Tensor, values: Tensor, kept: Tensor, log_score: Tensor, threshold: float, bias: Tensor | None = None,
        verbatim: Tensor | None = None,
    ) -> None:  # fmt: skip
        bias = torch.zeros_like(log_score) if bias is None else bias
        target = nearest_kept(keys, kept, threshold, verbatim)
        target = target.masked_fill(bias.isneginf(), -1)  # fills up, stands for nothing
        self.before, self.groups = (keys, values, bias), Groups(kept, target)
        member, slot = self.groups.member, self.groups.slot
        score, own = log_score[member], bias[member].exp()  # ln s_i, p_i
        mass = score + bias[member]
        top = self.groups.max(mass)
        self.log_mass = self.groups.sum((mass - top[slot]).exp()).log() + top  # ln W
        self.votes = self.groups.sum(own)  # P
        self.log_mean = self.log_mass - self.votes.log()  # ln R = ln(W/P)
        self.pi = (mass - self.log_mass[slot]).exp()
        self.share = own / self.votes[slot]  # m_i
        self.pi_level = self.groups.sum(self.pi * score)  # E_π ln s
        self.level = self.groups.sum(self.share * score)  # E_m ln s

    def exact_weights(self) -> Tensor:
        """θ = (1-τ) m + τ π with τ = KL(m||π) / (KL(m||π) + KL(π||m)): then sum θ_i ln s_i = ln R exactly."""
        below = (self.log_mean - self.level).clamp(min=0)
        above = (self.pi_level - self.log_mean).clamp(min=0)
        tau = torch.where(below + above > 1e-12, below / (below + above), 0.5)[self.groups.slot]
        return (1 - tau) * self.share + tau * self.pi

    def result(self, keys: Tensor, fallbacks: int) -> Merged:
        return self.groups.result(self.before, keys, self.groups.mean(self.before[1], self.pi), self.votes.log(), fallbacks)


METHODS = (
    Method(
        "keepkv-paper",
        "votes and ZIP merging as in the paper, with its pole guarded",
        "KeepKV, arXiv 2504.09936",
        moving_average,
        allot.cosine_layers,
        recent=0.8,
        merge=by_similarity(zip_merge, moving_average),
        cost="32 queries' attention and one cosine of every pair of a dropped and a kept key",
        good="lossless for the query that it was computed for",
        bad="every other query: kept keys move",
    ),
    Method(
        "keepkv-code",
        "votes and weighted-mean keys, as the authors' code does",
        "KeepKV, code of the authors",
        weighted_window,
        allot.cosine_layers,
        recent=0.2,
        merge=by_similarity(mean_merge, window_mean),
        cost="as keepkv-paper",
        good="comparing with the published code",
        bad="attends e^KL too loudly to what it merged",
    ),
    Method(
        "keepkv-exact",
        "as keepkv-paper, with convex-exact keys: lossless for its query without a pole",
        "KeepKV, arXiv 2504.09936; SYSTEMS 4.3",
        moving_average,
        allot.cosine_layers,
        recent=0.8,
        merge=by_similarity(convex_exact_merge, moving_average),
        cost="as keepkv-paper",
        good="the paper's guarantee, with an error bound",
        bad="other queries: kept keys move",
    ),
)
