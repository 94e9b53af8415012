"""Sets: entries merged with others into one slot, by the similarity of their keys.

Functions map (keys [T, d], values [T, d_v], kept [n]) and what else they need to a `Merged`, as in merge.py. A slot that
nothing was merged into keeps its key, value and vote bit for bit. bias [T], where given, is the log of the votes that the
entries have already, from earlier merges: so merges compose. verbatim, bool [T]: entries that nothing may be merged into.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from keepkv.merge import Merged
from keepkv.types import Choice


def similarity(keys: Tensor, kept: Tensor, verbatim: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For every entry its greatest cosine with a kept key, and the index into `kept` of that key; -inf, 0 if there is none."""
    direction = normalize(keys, dim=-1)
    closeness = direction @ direction[kept].T
    if verbatim is not None:
        closeness.masked_fill_(verbatim[kept], -torch.inf)
    best, target = closeness.max(-1)
    return best, target


def nearest_kept(keys: Tensor, kept: Tensor, threshold: float, verbatim: Tensor | None = None) -> Tensor:
    """For every entry the index into `kept` it merges into, int64 [T]: its own, or the most similar kept key's.

    -1 where the best cosine is not above the threshold: dropped. KeepKV, Algorithm 1.
    """
    best, target = similarity(keys, kept, verbatim)
    target = target.masked_fill(best <= threshold, -1)
    target[kept] = torch.arange(len(kept), device=keys.device)
    return target


class Groups:
    """The entries grouped by the slot they go to, target [T] as in `Choice`. Sums are deterministic.

    member [m]: the entries that go anywhere, slot by slot; slot [m]: where to; size [n]: how many a slot takes over.
    """

    def __init__(self, kept: Tensor, target: Tensor) -> None:
        member = (target >= 0).nonzero().flatten()
        self.kept, self.member = kept, member[target[member].argsort(stable=True)]
        self.slot = target[self.member]
        self.size = torch.bincount(self.slot, minlength=len(kept))

    def sum(self, x: Tensor) -> Tensor:
        """Of x [m] or [m, k] over each slot's members."""
        return self._reduce(x, "sum")

    def max(self, x: Tensor) -> Tensor:
        return self._reduce(x, "max")

    def mean(self, x: Tensor, weights: Tensor) -> Tensor:
        """sum of weights [m] times x [T, k] over each slot's members, [n, k]."""
        return self.sum(weights[:, None] * x[self.member])

    def shares(self, weights: Tensor) -> Tensor:
        """weights [m] divided by the sum over their slot's members."""
        return weights / self.sum(weights)[self.slot]

    def result(
        self, before: tuple[Tensor, Tensor, Tensor], keys: Tensor, values: Tensor, bias: Tensor, fallbacks: int = 0
    ) -> Merged:
        """The merged keys, values and bias; what stays alone is as before: keys [T, d], values, bias."""
        alone = self.size == 1
        old_keys, old_values, old_bias = (x[self.kept] for x in before)
        return Merged(
            torch.where(alone[:, None], old_keys, keys),
            torch.where(alone[:, None], old_values, values),
            torch.where(alone, old_bias, bias),
            fallbacks,
        )

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        flat = x.reshape(len(x), -1).contiguous()
        reduced: Tensor = torch.segment_reduce(flat, how, lengths=self.size)
        return reduced.reshape(-1, *x.shape[1:])


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


# --- without scores ---


def centroid(keys: Tensor, values: Tensor, choice: Choice, bias: Tensor | None = None) -> Merged:
    """Means, and the number of members as a vote. Chelsea / CentroidKV, arXiv 2506.11418.

    k_r = sum p_i k_i / P, v_r = sum p_i v_i / P, bias ln P with P = sum p_i, p the votes (1 for a token). It attends a little
    too quietly, by e^-KL (SYSTEMS 4.1), as in the paper.
    """
    groups, bias, votes = _grouped(choice, bias, keys)
    share = groups.shares(votes)
    before = keys, values, bias
    return groups.result(before, groups.mean(keys, share), groups.mean(values, share), groups.sum(votes).log())


def gaussian(
    keys: Tensor, values: Tensor, choice: Choice, bias: Tensor | None = None, sigma: float = 5.0, sized: bool = False
) -> Merged:  # fmt: skip
    """Means weighted by the distance from the set's pivot, its kept entry. KVMerger, arXiv 2407.08454.

    g_i = exp(-||k_p - k_i||² / 2σ²), k_r = sum g_i k_i / sum g_i, v_r = sum g_i v_i / sum g_i. No votes: the set attends as
    one token. sized: v_r times the set's size, as notes on the paper have it (SYSTEMS 6.3); that mends the numerator of
    attention and not its denominator, and breaks the model wherever much is merged (docs/log.md).
    """
    groups, bias, votes = _grouped(choice, bias, keys)
    distance = (keys[groups.kept[groups.slot]] - keys[groups.member]).square().sum(1)
    share = groups.shares(votes * (-distance / (2 * sigma**2)).exp())
    mean = groups.mean(values, share)
    mean = mean * groups.size[:, None] if sized else mean
    return groups.result((keys, values, bias), groups.mean(keys, share), mean, bias[groups.kept])


def by_cosine(
    keys: Tensor, values: Tensor, choice: Choice, bias: Tensor | None = None, verbatim: Tensor | None = None
) -> Merged:
    """Dropped entries join the most similar kept one, if similar enough. D2O, arXiv 2406.13035, the paper's weights.

    Entry i joins c = argmax cos(k_i, k_c) if that cosine is at least τ, the mean of the dropped entries' greatest cosines;
    weights e^cos normalised over c (cosine 1) and what joins it, the same for keys and values; no votes. SYSTEMS 6.2.
    """
    bias = torch.zeros(len(keys), device=keys.device) if bias is None else bias
    best, target = similarity(keys, choice.kept, verbatim)
    gone = ~bias.isneginf() & best.isfinite()
    gone[choice.kept] = False
    threshold = best[gone].mean() if gone.any() else 0
    target = target.masked_fill(~gone | (best < threshold), -1)
    target[choice.kept] = torch.arange(len(choice.kept), device=keys.device)
    groups, bias, votes = _grouped(Choice(choice.kept, target), bias, keys)
    close = best[groups.member].masked_fill(groups.member == choice.kept[groups.slot], 1)
    share = groups.shares(votes * close.exp())
    return groups.result((keys, values, bias), groups.mean(keys, share), groups.mean(values, share), bias[choice.kept])


def _grouped(choice: Choice, bias: Tensor | None, keys: Tensor) -> tuple[Groups, Tensor, Tensor]:
    """The groups, the bias of all entries, and the members' votes."""
    assert choice.target is not None, "the method's choice says what is merged into what"
    groups = Groups(choice.kept, choice.target)
    bias = torch.zeros(len(keys), device=keys.device) if bias is None else bias
    return groups, bias, bias[groups.member].exp()


def followers(values: Tensor, kept: Tensor, mass: Tensor, chance: Tensor, present: Tensor, spread: int = 32) -> Tensor:
    """Values [T, d_v] after each dropped one was, or was not, spread over the entries that follow. CaM, ICML 2024, SYSTEMS 6.1.

    One entry after the other, oldest first, as if each had been dropped when its turn came: with probability
    p = min(1, a_i / mean of a over the m = 32 next), a [T] the attention received, v_i / m is added to each of them. chance
    [T], uniform in [0, 1), decides. Applied to all dropped entries at once it would pile up on the few that stay.
    """
    count = len(values)
    values, gone = values.clone(), present.clone()
    gone[kept] = False
    held = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    first = torch.arange(1, count + 1, device=mass.device)
    last = (first + spread).clamp(max=count)
    following = (held[last] - held[first]) / (last - first).clamp(min=1)
    lucky = gone & (chance * following < mass) & (last > first)
    for index in lucky.nonzero().flatten().tolist():
        values[index + 1 : index + 1 + spread] += values[index] / min(spread, count - index - 1)
    return values
