"""Merge: what the kept slots of one head take over from the tokens that lose theirs.

Nothing (`evict`), or what reference rows say they must: votes and values are fitted, keys stay in place. Merging by similarity
is in sets.py. Every function gives a `Merged`: float32 keys [n, d], values [n, d_v], bias [n] (the log of the votes) and a
count of what it had to fall back on. bias [T], where given, is the log of the votes that the entries have already, from
earlier merges: so merges compose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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


def match(values: Tensor, kept: Tensor, rows: Rows, verbatim: Tensor | None = None, strength: float = 1e-3) -> Merged:
    """Attention Matching's fast fit, keys in place. arXiv 2602.16284; SYSTEMS 6.6, steps 3 and 4.

    A_qj = exp(q·k_j + b_j - ln Z_q) on the kept keys. w = least squares of A w = 1, clamped at 1e-12, then two projected
    gradient steps of length 1/||A||²; β = ln w within [-3, 3]. Values: ridge least squares of X C = Y, X the rows of A e^β
    normalised, Y the exact outputs, λ = strength × mean diagonal. Unlike `fit` it does not pull towards the old values, weighs
    all rows alike, and is not checked on held-out rows. Slots of verbatim entries, bool [T], are not touched.
    """
    keys, bias = rows.keys, rows.bias
    old = torch.zeros(len(kept), device=keys.device) if bias is None else bias[kept]
    if len(kept) == (len(keys) if bias is None else int((bias > -torch.inf).sum())):
        return evict(keys, values, kept, bias)
    share = rows.share(kept)
    gram, target = share.T @ share, share.sum(0)
    w = solve.ridge(gram, target[:, None], 1e-6)[:, 0].clamp(min=1e-12)
    direction = torch.ones_like(w)
    for _ in range(3):
        direction = gram @ direction
        direction = direction / direction.norm().clamp(min=1e-30)
    step = 1 / float((gram @ direction).norm().clamp(min=1e-30))
    for _ in range(2):
        w = (w - step * (gram @ w - target)).clamp(min=1e-12)
    free = torch.ones_like(kept, dtype=torch.bool) if verbatim is None else ~verbatim[kept]
    beta = w.log().clamp(-3, 3).masked_fill(~free, 0)
    share = share * beta.exp()
    share = share / share.sum(1, keepdim=True).clamp(min=1e-30)
    fitted, part = values[kept].clone(), share[:, free]
    rest = rows.outputs - share[:, ~free] @ fitted[~free]
    fitted[free] = solve.ridge(part.T @ part, part.T @ rest, strength)
    return Merged(keys[kept], fitted, old + beta)
