"""Attention Matching: votes and values fitted to the queries of a repetition. arXiv 2602.16284."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from keepkv import allot
from keepkv.merge.fit import slots_to_fit
from keepkv.merge.merged import Merged
from keepkv.merge.per_head import fitted
from keepkv.methods.base import Method
from keepkv.observe.references import attend_all
from keepkv.observe.repetition import WHOLE
from keepkv.ops import least_squares
from keepkv.types import Observation, ReferenceRows, References


def match(
    values: Tensor, kept: Sequence[Tensor], rows: ReferenceRows, verbatim: Tensor | None = None, strength: float = 1e-3
) -> list[Merged]:
    """Attention Matching's fast fit, keys in place. arXiv 2602.16284, section 3.

    `docs/theory.md 7.1`, and `docs/theory.md 7.2` for what differs from the paper.

    With the shares A_qj = exp(q·k_j + b_j - ln Z_q) on the kept keys:

        votes    w = least squares of A w = 1, clamped at 1e-12, then two projected gradient steps of length 1/||A||²;
                 β = ln w within [-3, 3], and the new bias is b + β
        values   C = least squares of X C = Y, X the rows of A e^β normalized, Y the exact outputs

    The ridge is 1e-6 of the mean diagonal for votes, and 1e-3 (`strength`) of it for values. Unlike the default's `fit`, this
    does not pull towards the old values, weighs all rows alike, and is not checked on rows that are held out. Slots that must
    stay verbatim keep vote and value, and the others are fitted around them.

    Args:
        values: As in `merge.fit.fit`, like the other arguments.
        kept: See there.
        rows: See there.
        verbatim: See there.
        strength: See above.
    """
    slots, free, before = slots_to_fit(kept, rows, verbatim)
    keys = slots.pick(rows.keys)
    own = slots.pick(values)
    share = rows.on(slots)

    # Votes. What is not free has a vote of 1, and its mass is there already.
    free_share = share * free[:, None]
    sunk = torch.as_tensor(rows.sunk, device=share.device)[..., None]
    fixed_mass = (share - free_share).sum(2, keepdim=True) + sunk
    gram = free_share.mT @ free_share
    target = free_share.sum(1)[..., None] - free_share.mT @ fixed_mass
    w = least_squares.ridge(gram, target, 1e-6, free).clamp(min=1e-12)
    direction = torch.ones_like(w)
    for _ in range(3):  # power iterations: ||A||² is the largest eigenvalue of AᵀA
        direction = gram @ direction
        direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-30)
    step = 1 / (gram @ direction).norm(dim=1, keepdim=True).clamp(min=1e-30)
    for _ in range(2):
        w = (w - step * (gram @ w - target)).clamp(min=1e-12)
    beta = w[..., 0].log().clamp(-3, 3).masked_fill(~free, 0)

    # Values, with these votes: what the others leave over of the exact outputs.
    share = share * beta.exp()[:, None]
    share = share / (share.sum(2, keepdim=True) + sunk).clamp(min=1e-30)
    free_share = share * free[:, None]
    rest = rows.outputs - share @ own.masked_fill(free[..., None], 0)
    solution = least_squares.ridge(free_share.mT @ free_share, free_share.mT @ rest, strength, free)
    new_values = torch.where(free[..., None], solution, own)
    per_head = zip(keys, new_values, before + beta, map(len, kept), strict=True)
    return [Merged(k[:n], v[:n], b[:n]) for k, v, b, n in per_head]


def repeated(observation: Observation) -> References:
    """The queries of a repetition of the text, as they were asked after it. Attention Matching, arXiv 2602.16284."""
    assert observation.repeated is not None, "the method table has the text repeated, and its queries kept"
    queries = observation.repeated.float().flatten(1, 2) * observation.scale
    keys, values = observation.keys.float(), observation.values.float()
    sinks = observation.softmax.of_rows(observation.heads, queries.shape[1])
    return attend_all(queries, keys, values, None, observation.bias, observation.tokens, observation.softmax, sinks)


def answered_most(observation: Observation) -> Tensor:
    """sqrt(mean over reference rows of share²): the highest attention keys. Attention Matching, arXiv 2602.16284, section 3."""
    assert observation.references is not None, "the method table names references"
    return observation.references.rms_share


METHODS = (
    Method(
        name="attention-matching",
        summary="highest attention keys, votes and values fitted to a repetition's queries",
        paper="Attention Matching, arXiv 2602.16284 (fast variant)",
        score=answered_most,
        allot=partial(allot.everywhere, floor=0.3),
        recent=0,
        merge=fitted(match),
        references=repeated,
        repeat=WHOLE,
        cost="reading the text again over its full cache, and two least-squares problems per head",
        good="understanding at small budgets",
        bad="verbatim details; queries unlike the repetition's",
    ),
)
