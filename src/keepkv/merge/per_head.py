"""Merges of whole layers, out of rules for one head or for a group of heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

from torch import Tensor

from keepkv.merge import merged
from keepkv.merge.merged import Merged
from keepkv.ops.ragged import groups
from keepkv.types import Choice, Observation

Merge = Callable[[Observation, Sequence[Choice]], list[Merged]]


def evict(observation: Observation, choices: Sequence[Choice]) -> list[Merged]:
    """Nothing is merged: what loses its slot is gone."""
    return [
        merged.evict(observation.keys[head], observation.values[head], choice.kept, observation.head_bias(head))
        for head, choice in enumerate(choices)
    ]


def fitted(rule: Callable[..., list[Merged]]) -> Merge:
    """A rule that fits votes and values to reference rows, as `fit.fit` does, for all heads of a layer.

    rule: (values [h, T, d_v], kept, rows, verbatim) -> h Merged. It is given as many heads at once as pays.
    """

    @wraps(rule)
    def merge_layer(observation: Observation, choices: Sequence[Choice]) -> list[Merged]:
        most = max(len(choice.kept) for choice in choices)
        results: list[Merged] = []
        for heads in groups(observation.heads, observation.keys.device, most * max(most, observation.reference_rows)):
            kept = [choice.kept for choice in choices[heads]]
            values = observation.values[heads].float()
            results += rule(values, kept, observation.rows(heads), observation.head_keep(heads))
        return results

    return merge_layer


def by_similarity(rule: Callable[..., Merged], log_score: Callable[[Observation], Tensor]) -> Merge:
    """A rule that merges each entry into the most similar kept one, by predicted scores, for all heads of a layer.

    rule: (keys, values, kept, log_score, bias=, verbatim=) -> Merged, as `methods.keepkv_paper.zip_merge`. log_score maps an
    Observation to the logarithm of the scores, [H, T].
    """

    @wraps(rule)
    def merge_layer(observation: Observation, choices: Sequence[Choice]) -> list[Merged]:
        heads = zip(observation.keys.float(), observation.values.float(), choices, log_score(observation), strict=True)
        return [
            rule(keys, values, choice.kept, score, bias=observation.head_bias(head), verbatim=observation.head_keep(head))
            for head, (keys, values, choice, score) in enumerate(heads)
        ]

    return merge_layer


def by_sets(rule: Callable[..., Merged]) -> Merge:
    """A rule that merges the sets that were chosen (`Choice.target`), for all heads of a layer.

    rule: (keys, values, choice, bias=) -> Merged, as `methods.chelsea.centroid`.
    """

    @wraps(rule)
    def merge_layer(observation: Observation, choices: Sequence[Choice]) -> list[Merged]:
        heads = zip(observation.keys.float(), observation.values.float(), choices, strict=True)
        return [rule(*inputs, bias=observation.head_bias(head)) for head, inputs in enumerate(heads)]

    return merge_layer
