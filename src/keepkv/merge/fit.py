"""Fit: votes and values of the kept slots, fitted to what reference rows want; keys stay in place. The default's merge.

bias, where the entries have one, is the logarithm of the votes that they have from earlier merges. New votes multiply these, so
that merges compose (`docs/theory.md 1.4`).
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
    values: Tensor,
    kept: Sequence[Tensor],
    rows: ReferenceRows,
    verbatim: Tensor | None = None,
    strength: float = 1e-3,
    trust: float = 1.0,
) -> list[Merged]:
    """Votes and values fitted together over reference rows, keys in place. `docs/theory.md 6`; after arXiv 2602.16284.

    With the shares A_qj = exp(q·k_j + b_j - ln Z_q) on the kept keys, where Y_q is the exact output of row q:

        votes    w >= 0 minimizing ||A w - 1||²; the new bias is b + ln w
        values   V + Δ minimizing sum_q m_q² ||o_q - Y_q||² + κ ||Δ||², m = A w the mass of the slots, o their output

    So rows that the slots hardly answer count little. κ is 1e-3 (`strength`) times the mean diagonal of w AᵀA w. The repetition
    is one more kind of rows, each asking for one slot alone: they pull votes to 1, and values to what they were.

    More than 512 slots are fitted in blocks along the text, each to what the others leave over, so that the cost grows with
    their number and not with its square (`docs/theory.md 6.4`).

    Every 8th row is held out. Unless the fit loses less there than eviction of the same entries does (or than `trust` times as
    much), the head is evicted instead, which is counted as a fallback (`docs/theory.md 6.5`). Both are judged as they will be
    stored.

    Args:
        values: [h, T, d_v] of h heads.
        kept: Each head's entries that keep a slot, int64 [n].
        rows: The reference rows of these heads.
        verbatim: bool [h, T]. Slots of these entries are not touched, and the others are fitted around them. None: no entries.
        strength: See above.
        trust: Below 1 for fits that a later compression will take for the truth.

    Returns:
        One `Merged` for each head, float32.
    """
    slots, free, before = slots_to_fit(kept, rows, verbatim)
    keys = slots.pick(rows.keys)
    own = slots.pick(values)
    counts = [len(entries) for entries in kept]
    count = rows.queries.shape[1]
    if count < HOLD_OUT or not (free.any() or rows.stored_as.rounds):
        return [Merged(k[:n], v[:n], b[:n]) for k, v, b, n in zip(keys, own, before, counts, strict=True)]

    train = torch.arange(count - count // HOLD_OUT, device=values.device)
    train = train + train // (HOLD_OUT - 1)  # all but every 8th
    judge = torch.arange(HOLD_OUT - 1, count, HOLD_OUT, device=values.device)
    trained, judged = rows.take(train), rows.take(judge)
    repeat_share = slots.pick(rows.repeat_share) * slots.real
    votes, fitted = _fitted(trained.on(slots), own, trained.outputs, repeat_share, free, strength, trained.sunk)

    share = judged.on(slots)
    stored, own_stored = rows.stored_as.round_values(fitted), rows.stored_as.round_values(own)
    dropped_share = rows.repeat_share.square().sum(1) - repeat_share.square().sum(1)  # what the repetition asks in vain
    error, mass_error = lost(share, votes, stored, judged.outputs, judged.sunk)
    evict_error, evict_mass_error = lost(share, torch.ones_like(votes), own_stored, judged.outputs, judged.sunk)
    has_free = free.any(1)
    better = has_free & (error < trust * evict_error)  # not if it is NaN
    fitted = torch.where(better[:, None, None], fitted, own)
    bias = before + torch.where(better[:, None], votes.log(), 0)
    figures = torch.stack(
        [
            (has_free & ~better).to(error.dtype),
            torch.where(better, error, evict_error) + dropped_share,
            torch.where(better, mass_error, evict_mass_error),
            evict_error + dropped_share,
        ]
    )
    changed = has_free | rows.stored_as.rounds
    per_head = figures.where(changed, 0).T.tolist()  # read from the device once
    return [
        Merged(k[:n], v[:n], b[:n], int(fell_back), *errors)
        for k, v, b, n, (fell_back, *errors) in zip(keys, fitted, bias, counts, per_head, strict=True)
    ]


def slots_to_fit(kept: Sequence[Tensor], rows: ReferenceRows, verbatim: Tensor | None) -> tuple[Ragged, Tensor, Tensor]:
    """The slots of several heads, which of them are free to be fitted, and the bias that they have already.

    A head that keeps all its entries has nothing to fit, and verbatim slots stay as they are.

    Returns:
        The slots, bool [h, n], and [h, n].
    """
    slots = Ragged.of(kept)
    have = rows.keys.shape[1] if rows.bias is None else (rows.bias > -torch.inf).sum(1, keepdim=True)
    free = slots.real & (slots.real.sum(1, keepdim=True) < have)
    if verbatim is not None:
        free &= ~slots.pick(verbatim)
    return slots, free, slots.pick(torch.zeros_like(rows.repeat_share) if rows.bias is None else rows.bias)


def _fitted(
    share: Tensor,
    values: Tensor,
    outputs: Tensor,
    repeat_share: Tensor,
    free: Tensor,
    strength: float,
    sunk: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Votes [h, n] and values [h, n, d_v], block by block, from shares [h, R, n] and exact outputs [h, R, d_v].

    sunk: the share of every row that a sink has [h, R]. It counts as a slot's mass and has no value. `docs/theory.md 6.4`.
    """
    votes, fitted = torch.ones_like(repeat_share), values.clone()
    mass = share.sum(2) + sunk
    asked_alone = share.shape[1] * repeat_share.square()  # R r², what the repetition asks of each slot
    count = share.shape[2]
    blocks = torch.arange(count).tensor_split(-(-count // BLOCK))
    ranges = [slice(int(block[0]), int(block[-1]) + 1) for block in blocks]
    grams = []
    for block in ranges:
        own_share = share[:, :, block]
        wanted = 1 - mass + own_share.sum(2)  # what the other slots leave over
        gram, target = least_squares.normal(own_share, repeat_share[:, block], wanted[..., None])
        target = (target[..., 0] + asked_alone[:, block]).clamp(min=0)
        votes[:, block] = least_squares.votes(gram, target, free[:, block])
        mass += (own_share @ (votes[:, block, None] - 1))[..., 0]
        grams.append(gram)
    rest = mass[..., None] * outputs - share @ (votes[..., None] * values)
    for block, gram in zip(ranges, grams, strict=True):
        own_share, vote = share[:, :, block], votes[:, block, None]
        own = asked_alone[:, block, None] * (1 - vote) * values[:, block]  # who asks for one slot wants its own value
        target = own_share.mT @ rest + own
        change = least_squares.ridge(vote * gram * vote.mT, vote * target, strength, free[:, block])
        fitted[:, block] += change
        rest -= own_share @ (vote * change)
    return votes, fitted


def lost(share: Tensor, votes: Tensor, values: Tensor, outputs: Tensor, sunk: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """The share of the output that is lost, and the rms error of the mass, over rows of exact shares on the slots, both [h].

    mean over rows of min(1, ||d||² / ||Y/2||²) with d = m o/(m + 1) - Y/2, o the output over the slots and m their mass: the
    output that is seen once the slots are joined with newer tokens of equal mass. It is bounded, so that no single row
    decides. sunk: the share of every row that a sink has, which is part of the mass. `docs/theory.md 6.5`.
    """
    mass = (share @ votes[..., None])[..., 0] + sunk
    wrong = (share @ (votes[..., None] * values)) / (mass[..., None] + 1) - outputs / 2
    lost = wrong.square().sum(2) / (outputs / 2).square().sum(2).clamp(min=1e-30)
    return lost.clamp(max=1).mean(1), (mass - 1).square().mean(1).sqrt()
