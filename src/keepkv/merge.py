"""Merge: what the kept slots of one head take over from the tokens that lose theirs.

Every function maps (keys [T, d], values [T, d_v], kept [n]) and what else it needs, to a `Merged`: float32 keys [n, d],
values [n, d_v], bias [n] (the log of the votes) and a count of what it had to fall back on. A slot that nothing was
merged into keeps its key, value and vote bit for bit. bias [T], where given, is the log of the votes that the entries
have already, from earlier merges: so merges compose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from keepkv import solve
from keepkv.types import Rows


class Merged(NamedTuple):
    keys: Tensor
    values: Tensor
    bias: Tensor
    fallbacks: int = 0
    error: float = 0.0  # share of the output lost on held-out reference rows and on recall rows; 0 where nothing is held out
    mass_error: float = 0.0  # rms error of the slots' mass there, as a share of the true mass
    evict_error: float = 0.0  # error, had the head been evicted


def evict(keys: Tensor, values: Tensor, kept: Tensor, bias: Tensor | None = None) -> Merged:
    """Nothing is merged: what is not kept is gone."""
    return Merged(keys[kept], values[kept], torch.zeros(len(kept), device=keys.device) if bias is None else bias[kept])


# --- merging by key similarity: KeepKV, arXiv 2504.09936 ---


def nearest_kept(keys: Tensor, kept: Tensor, threshold: float, verbatim: Tensor | None = None) -> Tensor:
    """For every entry the index into `kept` it merges into, int64 [T]: its own, or the most similar kept key's.

    -1 where the best cosine is not above the threshold: dropped. KeepKV, Algorithm 1. Nothing merges into entries that are
    verbatim, bool [T].
    """
    direction = normalize(keys, dim=-1)
    closeness = direction @ direction[kept].T
    if verbatim is not None:
        closeness.masked_fill_(verbatim[kept], -torch.inf)
    similarity, target = closeness.max(-1)
    target = target.masked_fill(similarity <= threshold, -1)
    target[kept] = torch.arange(len(kept), device=keys.device)
    return target


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
    sets = _Sets(keys, values, kept, log_score, threshold, bias, verbatim)
    scale = sets.log_mean / sets.pi_level
    spread = sets.pi_level - sets.log_mean  # KL(π||m) >= 0
    unsafe = (sets.pi_level.abs() < (2 * spread).clamp(min=1e-3)) | (scale < 0.5) | (scale > 2) | scale.isnan()
    merged = torch.where(unsafe[:, None], sets.mean(keys, sets.exact_weights()), scale[:, None] * sets.mean(keys, sets.pi))
    return sets.result(merged, int((unsafe & (sets.size > 1)).sum()))


def convex_exact_merge(
    keys: Tensor, values: Tensor, kept: Tensor, log_score: Tensor, threshold: float = 0.8, bias: Tensor | None = None,
    verbatim: Tensor | None = None,
) -> Merged:  # fmt: skip
    """ZIP's guarantee without its pole: the key stays in the convex hull of its sources. SYSTEMS 4.3, rule B."""
    sets = _Sets(keys, values, kept, log_score, threshold, bias, verbatim)
    return sets.result(sets.mean(keys, sets.exact_weights()), 0)


def mean_merge(
    keys: Tensor, values: Tensor, kept: Tensor, log_score: Tensor, threshold: float = 0.8, bias: Tensor | None = None,
    verbatim: Tensor | None = None,
) -> Merged:  # fmt: skip
    """The authors' code: k_r = sum w k / sum w without the ZIP scale, w = s + ε; votes summed. SYSTEMS section 2."""
    epsilon = torch.tensor(6.1e-5, device=keys.device).log()
    sets = _Sets(keys, values, kept, torch.logaddexp(log_score, epsilon), threshold, bias, verbatim)
    return sets.result(sets.mean(keys, sets.pi), 0)


class _Sets:
    """The tokens grouped by the slot they merge into, with each set's statistics. Sums are deterministic."""

    def __init__(
        self, keys: Tensor, values: Tensor, kept: Tensor, log_score: Tensor, threshold: float, bias: Tensor | None = None,
        verbatim: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.keys, self.values, self.kept = keys, values, kept
        self.bias = torch.zeros_like(log_score) if bias is None else bias
        target = nearest_kept(keys, kept, threshold, verbatim)
        target = target.masked_fill(self.bias.isneginf(), -1)  # fills up, stands for nothing
        self.member = (target >= 0).nonzero().flatten()
        self.member = self.member[target[self.member].argsort(stable=True)]
        self.target = target[self.member]
        self.size = torch.bincount(self.target, minlength=len(kept))
        score, own = log_score[self.member], self.bias[self.member].exp()  # ln s_i, p_i
        mass = score + self.bias[self.member]
        top = self._reduce(mass[:, None], "max")[:, 0]
        self.log_mass = self._sum((mass - top[self.target]).exp()).log() + top  # ln W
        self.votes = self._sum(own)  # P
        self.log_mean = self.log_mass - self.votes.log()  # ln R = ln(W/P)
        self.pi = (mass - self.log_mass[self.target]).exp()
        self.share = own / self.votes[self.target]  # m_i
        self.pi_level = self._sum(self.pi * score)  # E_π ln s
        self.level = self._sum(self.share * score)  # E_m ln s

    def exact_weights(self) -> Tensor:
        """θ = (1-τ) m + τ π with τ = KL(m||π) / (KL(m||π) + KL(π||m)): then sum θ_i ln s_i = ln R exactly."""
        below = (self.log_mean - self.level).clamp(min=0)
        above = (self.pi_level - self.log_mean).clamp(min=0)
        tau = torch.where(below + above > 1e-12, below / (below + above), 0.5)[self.target]
        return (1 - tau) * self.share + tau * self.pi

    def mean(self, x: Tensor, weights: Tensor) -> Tensor:
        return self._reduce(weights[:, None] * x[self.member], "sum")

    def result(self, merged_keys: Tensor, fallbacks: int) -> Merged:
        alone = (self.size == 1)[:, None]
        new_keys = torch.where(alone, self.keys[self.kept], merged_keys)
        new_values = torch.where(alone, self.values[self.kept], self.mean(self.values, self.pi))
        new_bias = torch.where(alone[:, 0], self.bias[self.kept], self.votes.log())
        return Merged(new_keys, new_values, new_bias, fallbacks)

    def _sum(self, x: Tensor) -> Tensor:
        return self._reduce(x[:, None], "sum")[:, 0]

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(x.contiguous(), how, lengths=self.size)


# --- merging by fitting: keys stay in place, votes and values answer for what was dropped ---

HOLD_OUT = 8  # every 8th reference row judges the fit instead of making it
BLOCK = 512  # slots fitted at once


def fit(values: Tensor, kept: Tensor, rows: Rows, verbatim: Tensor | None = None, strength: float = 1e-3) -> Merged:
    """Votes and values fitted together over reference rows, keys in place. DESIGN section 5; after arXiv 2602.16284.

    A_qj = exp(q·k_j + b_j - ln Z_q) on the kept keys. Votes: w >= 0 minimising ||A w - 1||²; the bias is b + ln w.
    Values: V + Δ minimising sum_q m_q² ||o_q - Y_q||² + λ||w Δ||², where m = A w is the mass of the slots, o their output and
    Y the exact one: rows that the slots hardly answer do not count. Both need one matrix, AᵀA.
    More than 512 slots are fitted in blocks along the text, each to what those before it left over (one sweep of block
    coordinate descent), so that the cost grows with their number and not with its square.
    Recall rows, each asking for one slot alone, count by their rms share: they pull votes to 1 and values to their own.
    Slots of entries that are verbatim, bool [T], are not touched: the others are fitted around them.
    Every 8th row is held out: where the fit answers them worse than eviction does, the head is evicted instead.
    """
    keys, bias = rows.keys, rows.bias
    if len(kept) == (len(keys) if bias is None else int((bias > -torch.inf).sum())):
        return evict(keys, values, kept, bias)
    held = torch.arange(len(rows.queries), device=keys.device) % HOLD_OUT == HOLD_OUT - 1
    free = torch.ones_like(kept, dtype=torch.bool) if verbatim is None else ~verbatim[kept]
    if not held.any() or not free.any():
        return evict(keys, values, kept, bias)
    judge, train = rows.take(held), rows.take(~held)
    votes, fitted = _fitted(train.share(kept), values[kept], train.outputs, rows.recall[kept], free, strength)
    share = judge.share(kept)
    unasked = float(rows.recall.square().sum() - rows.recall[kept].square().sum())  # what dropped tokens were asked for
    error, mass_error = _lost(share, votes, fitted, judge.outputs)
    evict_error, evict_mass_error = _lost(share, torch.ones_like(votes), values[kept], judge.outputs)
    if error < evict_error:  # not if it is NaN
        return Merged(
            keys[kept],
            fitted,
            votes.log() + (0 if bias is None else bias[kept]),
            0,
            error + unasked,
            mass_error,
            evict_error + unasked,
        )
    evict_error += unasked
    return evict(keys, values, kept, bias)._replace(
        fallbacks=1, error=evict_error, mass_error=evict_mass_error, evict_error=evict_error
    )


def _fitted(
    share: Tensor, values: Tensor, outputs: Tensor, recall: Tensor, free: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    """Votes [n] and values [n, d_v] from shares [R, n] and exact outputs [R, d_v], block by block; see `fit`."""
    votes, fitted, mass = values.new_ones(len(values)), values.clone(), share.sum(1)
    alone = len(share) * recall.square()
    blocks = torch.arange(len(values), device=values.device).tensor_split(-(-len(values) // BLOCK))
    ranges = [slice(int(block[0]), int(block[-1]) + 1) for block in blocks]
    grams = []
    for block in ranges:
        part = share[:, block]
        wanted = 1 - mass + part.sum(1)  # what the other slots leave over
        gram, target = solve.normal(part, recall[block], wanted)
        votes[block] = solve.votes(gram, (target + alone[block]).clamp(min=0), free[block])
        mass += part @ (votes[block] - 1)
        grams.append(gram)
    rest = mass[:, None] * outputs - share @ (votes[:, None] * values)
    for block, gram in zip(ranges, grams, strict=True):
        part, vote, some = share[:, block], votes[block, None], free[block]
        target = part.T @ rest + alone[block, None] * (1 - vote) * values[block]  # who asks for one slot wants its own value
        scaled = (vote * gram * vote.T)[some][:, some]
        change = torch.zeros_like(target)
        change[some] = solve.ridge(scaled, (vote * target)[some], strength)
        fitted[block] += change
        rest -= part @ (vote * change)
    return votes, fitted


def _lost(share: Tensor, votes: Tensor, values: Tensor, outputs: Tensor) -> tuple[float, float]:
    """The share of the output that is lost, and the rms error of the mass, over rows of exact shares on the slots.

    mean over rows of min(1, ||d||² / ||Y/2||²) with d = m o/(m + 1) - Y/2, o the output over the slots and m their mass: the
    output that is seen once the slots are joined with newer tokens of equal mass. It is bounded, so that no single row
    decides.
    """
    mass = share @ votes
    wrong = (share @ (votes[:, None] * values)) / (mass[:, None] + 1) - outputs / 2
    lost = wrong.square().sum(1) / (outputs / 2).square().sum(1).clamp(min=1e-30)
    return float(lost.clamp(max=1).mean()), float((mass - 1).square().mean().sqrt())
