"""Merges of whole layers out of rules for one head, or for a group of heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

from torch import Tensor

from keepkv.merge import merged
from keepkv.merge.merged import Merged
from keepkv.ops.ragged import groups
from keepkv.types import Choice, Observation

Merge = Callable[[Observation, Sequence[Choice]], list[Merged]]


def evict(seen: Observation, choices: Sequence[Choice]) -> list[Merged]:
    """Nothing is merged: what loses its slot is gone."""
    return [merged.evict(seen.keys[h], seen.values[h], c.kept, seen.head_bias(h)) for h, c in enumerate(choices)]


def fitted(rule: Callable[..., list[Merged]]) -> Merge:
    """A rule that fits votes and values to reference rows (merge.py), for all heads of a layer, as many at once as pays."""

    @wraps(rule)
    def merge_layer(seen: Observation, choices: Sequence[Choice]) -> list[Merged]:
        most = max(len(choice.kept) for choice in choices)
        made: list[Merged] = []
        for heads in groups(seen.heads, seen.keys.device, most * max(most, seen.reference_rows)):
            kept = [choice.kept for choice in choices[heads]]
            made += rule(seen.values[heads].float(), kept, seen.rows(heads), seen.head_keep(heads))
        return made

    return merge_layer


def by_similarity(rule: Callable[..., Merged], log_score: Callable[[Observation], Tensor]) -> Merge:
    """A rule that merges each entry into the most similar kept one, by predicted scores (sets.py), for all heads of a layer."""

    @wraps(rule)
    def merge_layer(seen: Observation, choices: Sequence[Choice]) -> list[Merged]:
        rows = zip(seen.keys.float(), seen.values.float(), choices, log_score(seen), strict=True)
        return [
            rule(keys, values, choice.kept, score, bias=seen.head_bias(h), verbatim=seen.head_keep(h))
            for h, (keys, values, choice, score) in enumerate(rows)
        ]

    return merge_layer


def by_sets(rule: Callable[..., Merged]) -> Merge:
    """A rule that merges the sets that were chosen (sets.py, cluster.py), for all heads of a layer."""

    @wraps(rule)
    def merge_layer(seen: Observation, choices: Sequence[Choice]) -> list[Merged]:
        rows = zip(seen.keys.float(), seen.values.float(), choices, strict=True)
        return [rule(*row, bias=seen.head_bias(h)) for h, row in enumerate(rows)]

    return merge_layer
