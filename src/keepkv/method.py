"""Method: one row of the table: a function per axis, what it must observe, its paper, and what a user should know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps

import torch
from torch import Tensor

from keepkv import allot, choose, merge, sets
from keepkv.draw import priority
from keepkv.heads import groups
from keepkv.merge import Merged
from keepkv.pairs import Pairs
from keepkv.recall import Repeat
from keepkv.rope import rotate
from keepkv.types import Choice, Observation, Reference

Merge = Callable[[Observation, Sequence[Choice]], list[Merged]]


def evict(seen: Observation, choices: Sequence[Choice]) -> list[Merged]:
    """Nothing is merged: what loses its slot is gone."""
    return [merge.evict(seen.keys[h], seen.values[h], c.kept, seen.head_bias(h)) for h, c in enumerate(choices)]


@dataclass(frozen=True)
class Method:
    """One row of the table: observe (reference, column_mass, repeat), score, allot, choose (sinks, recent, choose), merge.

    cost, good and bad are for its page: what it costs, what it is good for, what it is bad at.
    """

    name: str
    summary: str
    paper: str
    score: Callable[[Observation], Tensor]
    allot: Callable[[Tensor, int], list[list[int]]] = allot.uniform
    sinks: int = 4  # first tokens that are always kept
    recent: int | float = 32  # newest tokens that are always kept; below 1, a share of the slots
    choose: Callable[[Observation, Tensor, Sequence[int]], list[Choice]] = choose.top
    merge: Merge = evict
    midway: Merge | None = None  # how, in the middle of a prompt that is repeated, if otherwise
    reference: Callable[[Observation], Reference] | None = None
    column_mass: bool = False  # all queries' attention must be summed while reading
    repeat: Repeat | None = None  # how the text is repeated, for methods that use what that asks for
    judged: bool = False  # measures its own error on held-out queries
    trial: int = 0  # slots per head of a first compression whose errors, if judged, correct the budgets
    keeps_all: bool = False  # whatever the budget
    share: Pairs | None = None  # neighbouring layers store their slots together
    cost: str = ""
    good: str = ""
    bad: str = ""

    @property
    def in_the_middle(self) -> Method:
        """The row for the middle of a prompt that is repeated while it is read."""
        return replace(self, merge=self.midway) if self.midway else self


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


@wraps(sets.by_cosine)
def by_cosine(seen: Observation, choices: Sequence[Choice]) -> list[Merged]:
    rows = zip(seen.keys.float(), seen.values.float(), choices, strict=True)
    return [sets.by_cosine(*row, bias=seen.head_bias(h), verbatim=seen.head_keep(h)) for h, row in enumerate(rows)]


@wraps(sets.followers)
def followers(seen: Observation, choices: Sequence[Choice]) -> list[Merged]:
    assert seen.column_mass is not None, "the method table asks for column_mass"
    made = []
    for h, choice in enumerate(choices):
        chance = priority(seen.positions[h], (seen.seed * 1_000 + seen.layer) * 1_000 + h).float() / 2**31
        values = sets.followers(seen.values[h].float(), choice.kept, seen.column_mass[h], chance, seen.present[h])
        made.append(merge.evict(seen.keys[h], values, choice.kept, seen.head_bias(h)))
    return made


def closed_up(seen: Observation, choices: Sequence[Choice]) -> list[Merged]:
    """Keys turned as if what is kept stood without gaps right before what comes next. StreamingLLM, arXiv 2309.17453.

    Key i of n is rotated from where it stood to T - n + i, T tokens read, so that distances are those within the cache.
    What is kept after earlier compressions stands without gaps already.
    """
    made = []
    for h, choice in enumerate(choices):
        stood = choice.kept + seen.tokens - seen.entries
        goal = torch.arange(seen.tokens - len(choice.kept), seen.tokens, device=stood.device)
        keys = rotate(seen.keys[h, choice.kept].float(), goal - stood, seen.inv_freq).to(seen.keys.dtype)
        bias = torch.zeros(len(choice.kept), device=stood.device) if seen.bias is None else seen.bias[h, choice.kept]
        made.append(Merged(keys, seen.values[h, choice.kept], bias))
    return made
