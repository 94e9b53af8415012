"""The method table. A method is one row: a function per axis, what it must observe, its paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from keepkv import allot, choose, merge, reference, score
from keepkv.errors import MethodError, nearest
from keepkv.merge import Merged
from keepkv.types import Observation, Reference

Kept = Sequence[Tensor]  # per KV head, the tokens that keep their slots


@dataclass(frozen=True)
class Method:
    """One row of the table: observe (reference, column_mass), score, allot, choose (sinks, recent, choose), merge."""

    name: str
    summary: str
    paper: str
    score: Callable[[Observation], Tensor]
    allot: Callable[[Tensor, int], list[list[int]]] = allot.uniform
    sinks: int = 4  # first tokens that are always kept
    recent: int | float = 32  # newest tokens that are always kept; below 1, a share of the slots
    choose: Callable[[Observation, Tensor, Sequence[int]], list[Tensor]] = choose.top
    merge: Callable[[Observation, Kept], list[Merged]] = lambda seen, kept: _evict(seen, kept)
    reference: Callable[[Observation], Reference] | None = None
    column_mass: bool = False  # all queries' attention must be summed while reading
    recall: bool = False  # can use what a repetition of the text asks for
    judged: bool = False  # measures its own error on held-out queries
    trial: int = 0  # slots per head of a first compression whose errors, if judged, correct the budgets
    keeps_all: bool = False  # whatever the budget


def _evict(seen: Observation, kept: Kept) -> list[Merged]:
    return [merge.evict(seen.keys[h], seen.values[h], k, seen.head_bias(h)) for h, k in enumerate(kept)]


def _fit(seen: Observation, kept: Kept) -> list[Merged]:
    return [merge.fit(seen.values[h].float(), k, seen.rows(h), seen.head_keep(h)) for h, k in enumerate(kept)]


def _by_similarity(
    rule: Callable[..., Merged], log_score: Callable[[Observation], Tensor]
) -> Callable[[Observation, Kept], list[Merged]]:
    def merge_layer(seen: Observation, kept: Kept) -> list[Merged]:
        rows = zip(seen.keys.float(), seen.values.float(), kept, log_score(seen), strict=True)
        return [rule(*row, bias=seen.head_bias(h), verbatim=seen.head_keep(h)) for h, row in enumerate(rows)]

    return merge_layer


METHODS = {
    method.name: method
    for method in (
        Method("full", "every token, whatever the budget: the yardstick", "", score.recency, keeps_all=True),
        Method("random", "random tokens, the first 4 and the last 32: the control", "", score.chance),
        Method(
            "streaming", "the first 4 and the newest tokens, at their own positions", "StreamingLLM, arXiv 2309.17453",
            score.recency, recent=0,
        ),
        Method(
            "h2o", "half newest tokens, half those with most accumulated attention", "H2O, arXiv 2306.14048",
            score.accumulated, sinks=0, recent=0.5, column_mass=True,
        ),
        Method(
            "snapkv", "what the last 32 queries attend to, pooled over neighbours", "SnapKV, arXiv 2404.14469",
            score.pooled_window, sinks=0,
        ),
        Method(
            "expected", "expected attention of Gaussian future queries × value norm", "Expected Attention, arXiv 2510.00636",
            score.expected_attention, recent=0,
        ),
        Method(
            "keepkv-paper", "votes and ZIP merging as in the paper, with its pole guarded", "KeepKV, arXiv 2504.09936",
            score.moving_average, allot.cosine_layers, recent=0.8,
            merge=_by_similarity(merge.zip_merge, score.moving_average),
        ),
        Method(
            "keepkv-code", "votes and weighted-mean keys, as the authors' code does", "KeepKV, code of the authors",
            score.weighted_window, allot.cosine_layers, recent=0.2,
            merge=_by_similarity(merge.mean_merge, score.window_mean),
        ),
        Method(
            "keepkv", "keys in place, votes and values fitted on future queries, global budgets (default)",
            "KeepKV, arXiv 2504.09936; Attention Matching, arXiv 2602.16284",
            score.output_change, allot.everywhere, recent=0, choose=choose.eliminate, merge=_fit,
            reference=reference.context, recall=True, judged=True, trial=32,
        ),
    )
}  # fmt: skip


def get(name: str | Method) -> Method:
    """The row called `name`; a Method passes through, so that own methods need no registration. Raises MethodError."""
    if isinstance(name, Method):
        return name
    if name not in METHODS:
        raise MethodError(f"unknown method {name!r}: {nearest(name, METHODS)} `keepkv methods` explains each")
    return METHODS[name]
