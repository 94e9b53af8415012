"""Merge: what the kept slots of one head take over from the tokens that lose theirs.

Nothing (`evict`), or what reference rows say they must: votes and values are fitted, keys stay in place. Merging by similarity
is in sets.py. Every function gives a `Merged`: float32 keys [n, d], values [n, d_v], bias [n] (the log of the votes) and a
count of what it had to fall back on. bias [T], where given, is the log of the votes that the entries have already, from
earlier merges: so merges compose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keepkv.merge.merged import Merged
from keepkv.ops import least_squares
from keepkv.ops.ragged import Ragged
from keepkv.types import ReferenceRows

HOLD_OUT = 8  # every 8th reference row judges the fit instead of making it
BLOCK = 512  # slots fitted at once


def fit(
    values: Tensor, kept: Sequence[Tensor], rows: ReferenceRows, verbatim: Tensor | None = None, strength: float = 1e-3,
    trust: float = 1.0,
) -> list[Merged]:  # fmt: skip
    """Votes and values fitted together over reference rows, keys in place. DESIGN section 5; after arXiv 2602.16284.

    values [h, T, d_v] of h heads, kept their slots' entries, each int64 [n]. A_qj = exp(q·k_j + b_j - ln Z_q) on the kept keys.
    Votes: w >= 0 minimising ||A w - 1||²; the bias is b + ln w.
    Values: V + Δ minimising sum_q m_q² ||o_q - Y_q||² + λ||w Δ||², where m = A w is the mass of the slots, o their output and
    Y the exact one: rows that the slots hardly answer do not count. Both need one matrix, AᵀA.
    More than 512 slots are fitted in blocks along the text, each to what those before it left over (one sweep of block
    coordinate descent), so that the cost grows with their number and not with its square.
    Recall rows, each asking for one slot alone, count by their rms share: they pull votes to 1 and values to their own.
    Slots of entries that are verbatim, bool [h, T], are not touched: the others are fitted around them.
    Every 8th row is held out: where the fit does not lose less there than `trust` times what eviction loses, the head is
    evicted instead; `trust` is below 1 for fits that a later one will take for the truth.
    """
    slots, free, before = _slots(kept, rows, verbatim)
    keys, own, count, device = slots.pick(rows.keys), slots.pick(values), rows.queries.shape[1], values.device
    if count < HOLD_OUT or not free.any():
        return [Merged(k[:n], v[:n], b[:n]) for k, v, b, n in zip(keys, own, before, map(len, kept), strict=True)]
    train = torch.arange(count - count // HOLD_OUT, device=device)
    train, judge = train + train // (HOLD_OUT - 1), torch.arange(HOLD_OUT - 1, count, HOLD_OUT, device=device)
    trained, judged = rows.take(train), rows.take(judge)
    repeat_share = slots.pick(rows.repeat_share) * slots.real
    votes, fitted = _fitted(trained.on(slots), own, trained.outputs, repeat_share, free, strength)
    share, outputs = judged.on(slots), judged.outputs
    unasked = rows.repeat_share.square().sum(1) - repeat_share.square().sum(1)  # what dropped tokens were asked for
    error, mass_error = _lost(share, votes, fitted, outputs)
    evict_error, evict_mass_error = _lost(share, torch.ones_like(votes), own, outputs)
    some = free.any(1)
    better = some & (error < trust * evict_error)  # not if it is NaN
    fitted = torch.where(better[:, None, None], fitted, own)
    bias = before + torch.where(better[:, None], votes.log(), 0)
    figures = torch.stack([
        (some & ~better).to(error.dtype), torch.where(better, error, evict_error) + unasked,
        torch.where(better, mass_error, evict_mass_error), evict_error + unasked,
    ])  # fmt: skip
    told = figures.where(some, 0).T.tolist()
    return [
        Merged(k[:n], v[:n], b[:n], int(fell), *errors)
        for k, v, b, n, (fell, *errors) in zip(keys, fitted, bias, map(len, kept), told, strict=True)
    ]


def _fitted(
    share: Tensor, values: Tensor, outputs: Tensor, repeat_share: Tensor, free: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    """Votes [h, n] and values [h, n, d_v] from shares [h, R, n] and exact outputs [h, R, d_v], block by block; see `fit`."""
    votes, fitted, mass = torch.ones_like(repeat_share), values.clone(), share.sum(2)
    alone, slots = share.shape[1] * repeat_share.square(), share.shape[2]
    blocks = torch.arange(slots).tensor_split(-(-slots // BLOCK))
    ranges = [slice(int(block[0]), int(block[-1]) + 1) for block in blocks]
    grams = []
    for block in ranges:
        part = share[:, :, block]
        wanted = 1 - mass + part.sum(2)  # what the other slots leave over
        gram, target = least_squares.normal(part, repeat_share[:, block], wanted[..., None])
        votes[:, block] = least_squares.votes(gram, (target[..., 0] + alone[:, block]).clamp(min=0), free[:, block])
        mass += (part @ (votes[:, block, None] - 1))[..., 0]
        grams.append(gram)
    rest = mass[..., None] * outputs - share @ (votes[..., None] * values)
    for block, gram in zip(ranges, grams, strict=True):
        part, vote = share[:, :, block], votes[:, block, None]
        own = alone[:, block, None] * (1 - vote) * values[:, block]  # who asks for one slot wants its own value
        target = part.mT @ rest + own
        change = least_squares.ridge(vote * gram * vote.mT, vote * target, strength, free[:, block])
        fitted[:, block] += change
        rest -= part @ (vote * change)
    return votes, fitted


def _lost(share: Tensor, votes: Tensor, values: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The share of the output that is lost, and the rms error of the mass, over rows of exact shares on the slots, both [h].

    mean over rows of min(1, ||d||² / ||Y/2||²) with d = m o/(m + 1) - Y/2, o the output over the slots and m their mass: the
    output that is seen once the slots are joined with newer tokens of equal mass. It is bounded, so that no single row
    decides.
    """
    mass = (share @ votes[..., None])[..., 0]
    wrong = (share @ (votes[..., None] * values)) / (mass[..., None] + 1) - outputs / 2
    lost = wrong.square().sum(2) / (outputs / 2).square().sum(2).clamp(min=1e-30)
    return lost.clamp(max=1).mean(1), (mass - 1).square().mean(1).sqrt()


def _slots(kept: Sequence[Tensor], rows: ReferenceRows, verbatim: Tensor | None) -> tuple[Ragged, Tensor, Tensor]:
    """The slots, which of them are free to be fitted, bool [h, n], and the votes' logs that they have already [h, n].

    A head that keeps all its entries has nothing to fit.
    """
    slots = Ragged.of(kept)
    have = rows.keys.shape[1] if rows.bias is None else (rows.bias > -torch.inf).sum(1, keepdim=True)
    free = slots.real & (slots.real.sum(1, keepdim=True) < have)
    if verbatim is not None:
        free &= ~slots.pick(verbatim)
    return slots, free, slots.pick(torch.zeros_like(rows.repeat_share) if rows.bias is None else rows.bias)
