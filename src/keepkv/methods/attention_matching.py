"""Attention Matching: votes and values fitted to the queries of a repetition. arXiv 2602.16284."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from keepkv import allot
from keepkv.merge.fit import _slots
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
    """Attention Matching's fast fit, keys in place, arguments as of `fit`. arXiv 2602.16284; SYSTEMS 6.6, steps 3 and 4.

    A_qj = exp(q·k_j + b_j - ln Z_q) on the kept keys. w = least squares of A w = 1, clamped at 1e-12, then two projected
    gradient steps of length 1/||A||²; β = ln w within [-3, 3]. Values: ridge least squares of X C = Y, X the rows of A e^β
    normalised, Y the exact outputs, λ = strength × mean diagonal. Unlike `fit` it does not pull towards the old values, weighs
    all rows alike, and is not checked on held-out rows. Slots of verbatim entries, bool [h, T], are not touched.
    """
    slots, free, before = _slots(kept, rows, verbatim)
    keys, own = slots.pick(rows.keys), slots.pick(values)
    share = rows.on(slots)
    gram, target = share.mT @ share, share.sum(1)[..., None]
    w = least_squares.ridge(gram, target, 1e-6, slots.real).clamp(min=1e-12)
    direction = torch.ones_like(w)
    for _ in range(3):
        direction = gram @ direction
        direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-30)
    step = 1 / (gram @ direction).norm(dim=1, keepdim=True).clamp(min=1e-30)
    for _ in range(2):
        w = (w - step * (gram @ w - target)).clamp(min=1e-12)
    beta = w[..., 0].log().clamp(-3, 3).masked_fill(~free, 0)
    share = share * beta.exp()[:, None]
    share = share / share.sum(2, keepdim=True).clamp(min=1e-30)
    part, some = share * free[:, None], free[..., None]
    rest = rows.outputs - share @ own.masked_fill(some, 0)
    fitted = torch.where(some, least_squares.ridge(part.mT @ part, part.mT @ rest, strength, free), own)
    return [Merged(k[:n], v[:n], b[:n]) for k, v, b, n in zip(keys, fitted, before + beta, map(len, kept), strict=True)]


def repeated(observation: Observation) -> References:
    """The queries of a repetition of the text, as they were asked after it. Attention Matching, arXiv 2602.16284."""
    assert observation.repeated is not None, "the method table has the text repeated, and its queries kept"
    queries = observation.repeated.float().flatten(1, 2) * observation.scale
    return attend_all(queries, observation.keys.float(), observation.values.float(), None, observation.bias, observation.tokens)


def answered_most(observation: Observation) -> Tensor:
    """sqrt(mean over reference rows of share²): the highest attention keys. Attention Matching, arXiv 2602.16284, section 3."""
    assert observation.references is not None, "the method table names references"
    return observation.references.rms_share


METHODS = (
    Method(
        "attention-matching",
        "highest attention keys, votes and values fitted to a repetition's queries",
        "Attention Matching, arXiv 2602.16284 (fast variant)",
        answered_most,
        partial(allot.everywhere, floor=0.3),
        recent=0,
        merge=fitted(match),
        references=repeated,
        repeat=WHOLE,
        cost="reading the text again over its full cache, and two least-squares problems per head",
        good="understanding at small budgets",
        bad="verbatim details; queries unlike the repetition's",
    ),
)
