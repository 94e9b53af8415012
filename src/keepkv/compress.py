"""The way of the data: observe -> score -> allot -> choose -> merge -> slots, for one sequence, all layers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from keepkv import allot
from keepkv.choose import protect
from keepkv.errors import BudgetError
from keepkv.merge.merged import Merged, evict
from keepkv.methods import Method
from keepkv.slots.layer_pairs import LayerPairs
from keepkv.slots.quantized import FLOAT, SlotDtype
from keepkv.slots.slots import BESIDE, Slots
from keepkv.types import Observation, Plan

Progress = Callable[[int, int], None]  # called with (steps done, steps in all)


@dataclass(frozen=True)
class Compressed:
    """One sequence, compressed: the plan, one Slots per layer, and per layer and head what the merge reported."""

    plan: Plan
    slots: tuple[Slots, ...]
    merged: tuple[tuple[Merged, ...], ...]


def compress(
    observations: Sequence[Observation], method: Method, total: int, progress: Progress = lambda done, of: None,
    slot_dtype: SlotDtype = FLOAT,
) -> Compressed:  # fmt: skip
    """Compresses the observed layers of one sequence to `total` slots over all layers and heads, or to their bytes.

    slot_dtype: how the slots are stored; votes and values are fitted to keys as they will be read.
    Raises BudgetError if the tokens that must stay (`Observation.keep`) do not fit into every head's slots.
    """
    if total == 0:  # a row of padding
        return _as_they_are(observations, [seen.present & False for seen in observations], slot_dtype)
    if total >= sum(sum(seen.counts) for seen in observations) and not method.layer_pairs:
        return _as_they_are(observations, [seen.present for seen in observations], slot_dtype)
    pinned = tokens = 0
    steps = iter(range(1, len(observations) * (3 if method.trial else 2) + 1))

    def step() -> None:
        progress(next(steps), len(observations) * (3 if method.trial else 2))

    references, scores, places = [], [], []
    for seen in observations:
        references.append(method.references(seen) if method.references else None)
        score = method.score(replace(seen, references=references[-1])).masked_fill(~seen.present, -torch.inf)
        if seen.keep is not None:
            score = score.masked_fill(seen.keep & seen.present, torch.inf)
            pinned = max(pinned, int((seen.keep & seen.present).sum(1).max()))
        scores.append(score)
        places.append(seen.positions)
        tokens = seen.tokens
        step()
    layered = Layered(_level(scores, -torch.inf), _level(places, -1), tokens)
    if method.layer_pairs:
        layered = layered._replace(scores=method.layer_pairs.tie(layered.scores))
        total = min(
            sum(sum(seen.counts) for seen in observations), int(total / _price(method.layer_pairs, observations[0], layered))
        )

    heads = layered.scores.shape[0] * layered.scores.shape[1]
    _check_room(pinned, total // heads)
    guarded, counts = _allotted(layered, method, total, pinned)
    _check_room(pinned, min(map(min, counts)))
    if method.trial:
        small = min(total, (method.trial + pinned) * heads)
        tried_scores, tried = _allotted(layered, method, small, pinned)
        errors = []
        for layer, (seen, score, slots) in enumerate(zip(observations, tried_scores, tried, strict=True)):
            watched = replace(seen, references=references[layer])
            tried_merge = method.merge(watched, method.choose(watched, _own(score, seen), slots))
            errors.append([head.error for head in tried_merge])
            step()
        counts = allot.by_need(counts, tried, errors, allot.room(guarded), _most_fixed(guarded))

    kept: list[tuple[Tensor, ...]] = []
    merged: list[tuple[Merged, ...]] = []
    parts: list[Slots] = []
    for layer, seen in enumerate(observations):
        watched = replace(seen, references=references[layer])
        references[layer] = None  # it is not needed any more
        choices = method.choose(watched, _own(guarded[layer], seen), counts[layer])
        kept.append(tuple(choice.kept for choice in choices))
        if slot_dtype.bits and method.references:
            watched = replace(watched, keys=slot_dtype.round(seen.keys))
        merged.append(tuple(method.merge(watched, choices)))
        parts.append(_flat(seen, kept[-1], merged[-1], slot_dtype))
        step()
    return Compressed(Plan(tuple(kept)), tuple(method.layer_pairs.pack(parts) if method.layer_pairs else parts), tuple(merged))


def _price(layer_pairs: LayerPairs, seen: Observation, layered: Layered) -> float:
    """What a slot takes, of one that shares nothing."""
    vectors = sum(x.shape[2] * x.element_size() for x in (seen.keys, seen.values))
    return layer_pairs.cost(len(layered.scores), vectors, BESIDE)


def _as_they_are(observations: Sequence[Observation], stay: Sequence[Tensor], slot_dtype: SlotDtype) -> Compressed:
    """The entries for which stay[layer], bool [H, T], is true, and nothing merged."""
    kept = tuple(tuple(head.nonzero()[:, 0] for head in layer) for layer in stay)
    merged = tuple(
        tuple(evict(seen.keys[h], seen.values[h], k, seen.head_bias(h)) for h, k in enumerate(heads))
        for seen, heads in zip(observations, kept, strict=True)
    )
    slots = [_flat(seen, k, m, slot_dtype) for seen, k, m in zip(observations, kept, merged, strict=True)]
    return Compressed(Plan(kept), tuple(slots), merged)


class Layered(NamedTuple):
    """Scores and places of all layers [L, H, T], and how many tokens were read.

    Layers with fewer entries than others are filled up in front: score -inf, place -1.
    """

    scores: Tensor
    places: Tensor
    tokens: int


def _level(layers: Sequence[Tensor], fill: float) -> Tensor:
    most = max(layer.shape[1] for layer in layers)
    return torch.stack([pad(layer, (most - layer.shape[1], 0), value=fill) for layer in layers])


def _own(scores: Tensor, seen: Observation) -> Tensor:
    """A layer's own scores [H, its entries]."""
    return scores[:, scores.shape[1] - seen.entries :]


def _allotted(layered: Layered, method: Method, total: int, pinned: int) -> tuple[Tensor, list[list[int]]]:
    """Scores [L, H, T] with what is always kept at +inf, and the slots of every layer and head.

    Sinks and recents yield where they and the entries that must stay do not fit together.
    """
    scores, places, tokens = layered
    guarded = protect(scores, places, tokens, total / (scores.shape[0] * scores.shape[1]), method.sinks, method.recent)
    counts = method.allot(guarded, total)
    if pinned and _most_fixed(guarded) > min(map(min, counts)):
        return scores, method.allot(scores, total)
    return guarded, counts


def _check_room(pinned: int, slots: int) -> None:
    if pinned > slots:
        raise BudgetError(f"{pinned} tokens must stay in every head, but there are only {slots} slots: give a larger budget")


def _most_fixed(scores: Tensor) -> int:
    """Tokens of a head that keep their slots whatever happens."""
    return int(scores.isposinf().sum(-1).max())


def _flat(observation: Observation, kept: Sequence[Tensor], merged: Sequence[Merged], slot_dtype: SlotDtype) -> Slots:
    return Slots(
        keys=slot_dtype.store(torch.cat([head.keys for head in merged]).to(observation.keys.dtype)),
        values=slot_dtype.store(torch.cat([head.values for head in merged]).to(observation.values.dtype)),
        bias=torch.cat([head.bias for head in merged]).float(),
        positions=torch.cat([observation.positions[h, k] for h, k in enumerate(kept)]).int(),
        offsets=(0, *accumulate(len(head) for head in kept)),
    )


def in_row(progress: Progress, row: int, rows: int, done: int, of: int) -> None:
    """Progress in one of several rows, told as that of all of them."""
    progress(row * of + done, rows * of)
