"""Attention Matching with budgets by exchange: slots go where an error curve of the head says so. arXiv 2602.16284."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from keepkv import allot, choose
from keepkv.choose import best
from keepkv.merge.fit import HOLD_OUT, lost
from keepkv.merge.per_head import fitted
from keepkv.methods.attention_matching import answered_most, match, repeated
from keepkv.methods.base import Method
from keepkv.observe.repetition import WHOLE
from keepkv.ops.ragged import Ragged
from keepkv.types import Choice, Observation, ReferenceRows

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)  # of a head's entries: as many slots are tried


def gains(observation: Observation) -> Tensor:
    """-d(E²)/dn: what one slot more saves the head, for each entry in the order of its share. [H, T].

    E(n), the head's error with n slots, is measured: n entries of the highest attention are fitted on half of the reference
    rows, and E is what is lost on every eighth row, which is held out (`docs/theory.md 6.5`). This is done for 1, 2, 5, 10, 20
    and 40% of the entries; E is 1 without any slot, and 0 with all. The n-th best entry scores the slope at n of the convex
    hull of E². If the best scores of all heads win, no slot can be moved from one head to another without raising the sum of
    E²: it is what exchanging slots greedily ends in. `docs/theory.md 7.3`.

    Attention Matching, arXiv 2602.16284, exchanges budgets greedily too, but along curves that are measured once for each
    model: the rise of the log-perplexity of answers when one head's budget changes while all the others have 5%, mean over
    several articles. So its budgets are shares that do not depend on the text, and weigh what an error does to the model's
    output. Here no calibration is needed, and a head's error counts as a share of that head's own output.
    """
    share = answered_most(observation)
    score = torch.full_like(share, -torch.inf)
    for head, count in enumerate(observation.counts):
        present = observation.present[head]
        order = share[head].masked_fill(~present, -torch.inf)
        slots = sorted({max(1, int(part * count)) for part in SHARES if int(part * count) < count})
        keep = [best(order, n) for n in slots]
        errors = error_curve(observation.values[head].float(), keep, observation.rows(slice(head, head + 1)))
        slopes = convex_slopes(*between([0, *slots, count], [1.0, *(error**2 for error in errors), 0.0]))
        score[head, order.argsort(descending=True, stable=True)[:count]] = slopes.to(score)
    return score


def error_curve(values: Tensor, kept: Sequence[Tensor], rows: ReferenceRows) -> list[float]:
    """What a head loses on rows held out, when so many entries are kept and fitted to others. `docs/theory.md 6.5`.

    Args:
        values: [T, d_v].
        kept: For every point of the curve, int64 [n].
        rows: All reference rows of this head, [1, R, ...].
    """
    row = torch.arange(rows.queries.shape[1], device=values.device)
    train, judge = rows.take(row[row % 2 == 0]), rows.take(row[row % HOLD_OUT == HOLD_OUT - 1])
    errors = []
    for entries in kept:
        merged = match(values[None], [entries], train)[0]
        before = 0 if rows.bias is None else rows.bias[0, entries]
        error, _ = lost(
            judge.on(Ragged.of([entries])), (merged.bias - before).exp()[None], merged.values[None], judge.outputs, judge.sunk
        )
        errors.append(float(error))
    return errors


def between(slots: Sequence[int], errors: Sequence[float], most: int = 32) -> tuple[list[int], list[float]]:
    """A measured curve with points between: E(n) = a n^-b through both neighbors, at most 32 (`most`) in each gap.

    The first gap, from no slot at all, and the last one, to no error, stay straight lines.
    """
    more = [*zip(slots, errors, strict=True)]
    for (lo, high), (hi, low) in pairwise(more[1:-1]):
        if high > low > 0:
            power = math.log(high / low) / math.log(hi / lo)
            step = -(-(hi - lo) // most)
            more += [(n, high * (lo / n) ** power) for n in range(lo + step, hi, step)]
    more.sort()
    return [n for n, _ in more], [error for _, error in more]


def convex_slopes(slots: Sequence[int], errors: Sequence[float]) -> Tensor:
    """The slopes of the lower convex hull of points (slots, errors), downwards, for every slot up to the last. [n].

    Example:
        >>> convex_slopes([0, 1, 2, 4], [1.0, 0.9, 0.4, 0.0])
        tensor([0.3000, 0.3000, 0.2000, 0.2000])
    """
    hull: list[tuple[int, float]] = []
    for point in zip(slots, errors, strict=True):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return torch.cat([torch.full((b[0] - a[0],), -_slope(a, b)) for a, b in pairwise(hull)]).clamp(min=0)


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def most_answered(observation: Observation, scores: Tensor, counts: Sequence[int]) -> list[Choice]:
    """Every head keeps its entries of the highest attention, after those that must stay."""
    share = answered_most(observation).masked_fill(~observation.present, -torch.inf)
    return choose.top(observation, share.masked_fill(scores.isposinf(), torch.inf), counts)


METHODS = (
    Method(
        name="attention-matching-budgets",
        summary="as attention-matching, its budgets exchanged along error curves of the heads",
        paper="Attention Matching, arXiv 2602.16284 (fast variant, nonuniform budgets)",
        score=gains,
        allot=partial(allot.everywhere, floor=0.3),
        recent=0,
        choose=most_answered,
        merge=fitted(match),
        references=repeated,
        repeat=WHOLE,
        cost="that of attention-matching, and six fits of every head",
        good="understanding at small budgets",
        bad="verbatim details; queries unlike the repetition's; time",
    ),
)
