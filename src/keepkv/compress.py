"""Compress: the way of the data. Start reading here.

    observe -> score -> allot -> choose -> merge -> slots

While a model reads, every layer observes (`observe/`). A compression scores what each layer holds (`score.py`), allots slots to
layers and heads (`allot.py`), chooses the entries that keep a slot (`choose.py`), merges the others into these or drops them
(`merge/`), and stores the result (`slots/`), which attention reads from then on (`attend/`). A method (`methods/`) names one
function for each of these steps. Here is one sequence, all layers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from keepkv import allot
from keepkv.choose import protect
from keepkv.errors import BudgetError
from keepkv.merge.merged import Merged, evict
from keepkv.methods import Method
from keepkv.observe.validation import Validation
from keepkv.slots.layer_pairs import LayerPairs
from keepkv.slots.slot_dtype import FLOAT, SlotDtype
from keepkv.slots.slots import BESIDE, Slots
from keepkv.types import Observation, Plan, References

Progress = Callable[[int, int], None]  # called with (steps done, steps in all)


@dataclass(frozen=True)
class Compressed:
    """One sequence, compressed.

    Args:
        plan: Which entries kept a slot.
        slots: One Slots for each layer.
        merged: `merged[layer][head]`, what the merge reported.
        losses: `losses[layer][head]`, as they are stored, in the text's newest quarter (`Validation.lost`); empty where that
            was not asked.
    """

    plan: Plan
    slots: tuple[Slots, ...]
    merged: tuple[tuple[Merged, ...], ...]
    losses: tuple[tuple[float, ...], ...] = ()

    @property
    def error(self) -> float:
        """The share of a head's output that is lost on held-out queries, a mean over heads; 0 if the method holds none out."""
        return fmean(head.error for layer in self.merged for head in layer)

    @property
    def lost(self) -> float:
        """What ways of compressing one sequence are compared by: the mean loss in the newest quarter, or else `error`."""
        return fmean(head for layer in self.losses for head in layer) if self.losses else self.error


def compress(
    observations: Sequence[Observation],
    method: Method,
    total: int,
    progress: Progress = lambda done, of: None,
    slot_dtype: SlotDtype = FLOAT,
) -> Compressed:
    """Compresses one sequence by a method.

    Args:
        observations: What each layer showed. It may be a sequence that makes an Observation whenever it is looked at.
        method: One function for each step.
        total: Slots over all layers and heads. Of a method that stores layers in pairs: as many slots as fit into their bytes.
        progress: Called with (steps done, steps in all).
        slot_dtype: How the slots are stored. Votes and values are fitted to the keys as they will be read.

    Raises:
        BudgetError: if the tokens that must stay (`Observation.keep`) do not fit into every head's slots.
    """
    return compress_in_ways(observations, method, [Way(slot_dtype, total)], progress)[0]


class Way(NamedTuple):
    """How slots are stored, and how many there are over all layers and heads."""

    slot_dtype: SlotDtype
    total: int


def compress_in_ways(
    observations: Sequence[Observation], method: Method, ways: Sequence[Way], progress: Progress = lambda done, of: None
) -> list[Compressed]:
    """Compresses one sequence in several ways, each as `compress` does it alone; what they have in common is computed once.

    They have the scores and the trials in common. A score that goes by the number of slots gets that of the largest way. The
    arguments are those of `compress`.
    """
    entries = sum(sum(observation.counts) for observation in observations)
    made = [_unmerged(observations, way.total > 0, way.slot_dtype) if _is_whole(way, method, entries) else None for way in ways]
    chosen = [Way(way.slot_dtype, min(way.total, entries)) for way, one in zip(ways, made, strict=True) if one is None]
    merged = iter(_merged(observations, method, chosen, entries, progress) if chosen else [])
    return [next(merged) if one is None else one for one in made]


def _is_whole(way: Way, method: Method, entries: int) -> bool:
    """Whether nothing is chosen: a row of padding has no entries, and where all stay, only what is rounded is fitted."""
    fitted = method.layer_pairs or (method.judged and way.slot_dtype.rounds)
    return way.total == 0 or (way.total >= entries and not fitted)


def _merged(
    observations: Sequence[Observation], method: Method, ways: Sequence[Way], entries: int, progress: Progress
) -> list[Compressed]:
    """The sequence of so many entries, compressed in every way."""
    step = _stepper(progress, len(observations) * (1 + bool(method.trials) + len(ways)))
    totals = [way.total for way in ways]
    scored = _score(observations, method, max(totals), step)
    if method.layer_pairs:
        price = _price(method.layer_pairs, observations[0], len(observations))
        totals = [min(entries, int(total / price)) for total in totals]
    allotted = [_allot(scored, method, total) for total in totals]
    if method.trials:
        allotted = _corrected(observations, scored, method, totals, allotted, step)

    made: list[list[_Layer]] = [[] for _ in ways]
    for layer, observation in enumerate(observations):
        with_references = replace(observation, references=scored.references[layer])
        scored.references[layer] = None  # they are large, and not needed any more
        validation = scored.validations[layer] if len(ways) > 1 else None
        for way, (scores, counts), layers in zip(ways, allotted, made, strict=True):
            one = _layer(with_references, method, _own(scores[layer], observation), counts[layer], way.slot_dtype)
            layers.append(one if validation is None else one._replace(lost=_read_loss(validation, one, observation)))
            step()
    return [_compressed(layers, method) for layers in made]


class _Layer(NamedTuple):
    """One layer, compressed: each head's entries that keep a slot, what the merge reported, the slots, and what they lose."""

    kept: tuple[Tensor, ...]
    merged: tuple[Merged, ...]
    slots: Slots
    lost: tuple[float, ...] = ()


def _layer(observation: Observation, method: Method, scores: Tensor, counts: Sequence[int], slot_dtype: SlotDtype) -> _Layer:
    """Compresses one layer to so many slots of each head."""
    choices = method.choose(observation, scores, counts)
    kept = tuple(choice.kept for choice in choices)
    read = observation
    if slot_dtype.rounds and method.references:  # fit to the keys as they will be read: docs/theory.md 9.2
        read = replace(observation, keys=slot_dtype.round_keys(observation.keys, kept), stored_as=slot_dtype)
    merged = tuple(method.merge(read, choices))
    return _Layer(kept, merged, _stored(observation, kept, merged, slot_dtype))


def _read_loss(validation: Validation, layer: _Layer, observation: Observation) -> tuple[float, ...]:
    """What a layer's heads lose in the newest quarter of the text, with their slots as they will be read."""
    slots = [Merged(*head) for head in layer.slots.read().per_head]
    return tuple(validation.lost(layer.kept, slots, observation.positions))


def _compressed(layers: Sequence[_Layer], method: Method | None = None) -> Compressed:
    """The layers of one sequence together."""
    kept, merged, slots, lost = zip(*layers, strict=True)
    packed = tuple(method.layer_pairs.pack(slots)) if method and method.layer_pairs else slots
    return Compressed(Plan(kept), packed, merged, lost if all(lost) else ())


@dataclass(frozen=True)
class _Scored:
    """References and validation rows of every layer, and scores and positions of all layers [L, H, T].

    Layers with fewer entries than others are filled up in front, with a score of -inf and a position of -1. tokens: how many
    were read. pinned: entries of a head that must stay; they have a score of +inf.
    """

    references: list[References | None]
    validations: list[Validation | None]
    scores: Tensor
    positions: Tensor
    tokens: int
    pinned: int

    @property
    def heads(self) -> int:
        """All heads of all layers."""
        return self.scores.shape[0] * self.scores.shape[1]


def _score(observations: Sequence[Observation], method: Method, total: int, step: Callable[[], None]) -> _Scored:
    """How much each entry of each layer matters, where so many slots in all will be left."""
    references: list[References | None] = []
    validations: list[Validation | None] = []
    scores, positions = [], []
    tokens = pinned = 0
    for observation in observations:
        references.append(method.references(observation) if method.references else None)
        slots = total / (observation.heads * len(observations))
        with_references = replace(observation, references=references[-1], slots=slots)
        validations.append(Validation.of(with_references) if method.trials else None)
        score = method.score(with_references)
        score = score.masked_fill(~observation.present, -torch.inf)
        if observation.keep is not None:
            must_stay = observation.keep & observation.present
            score = score.masked_fill(must_stay, torch.inf)
            pinned = max(pinned, int(must_stay.sum(1).max()))
        scores.append(score)
        positions.append(observation.positions)
        tokens = observation.tokens
        step()
    together = _levelled(scores, -torch.inf)
    if method.layer_pairs:
        together = method.layer_pairs.tie(together)
    return _Scored(references, validations, together, _levelled(positions, -1), tokens, pinned)


def _allot(scored: _Scored, method: Method, total: int) -> tuple[Tensor, list[list[int]]]:
    """Scores [L, H, T] with what is always kept at +inf, and the slots of every layer and head `[L][H]`.

    The first and the newest tokens yield where they and the entries that must stay do not fit together.
    """
    _check_room(scored.pinned, total // scored.heads)
    scores, counts = _allotted(scored, method, total)
    _check_room(scored.pinned, min(map(min, counts)))
    return scores, counts


def _allotted(scored: _Scored, method: Method, total: int) -> tuple[Tensor, list[list[int]]]:
    """As `_allot`, but nothing is checked."""
    rule = allot.together(method.allot) if method.same_tokens_in_all_heads else method.allot
    slots = total / scored.heads
    scores = protect(scored.scores, scored.positions, scored.tokens, slots, method.sinks, method.recent)
    counts = rule(scores, total)
    if scored.pinned and _most_fixed(scores) > min(map(min, counts)):
        return scored.scores, rule(scored.scores, total)
    return scores, counts


def _corrected(
    observations: Sequence[Observation],
    scored: _Scored,
    method: Method,
    totals: Sequence[int],
    allotted: Sequence[tuple[Tensor, list[list[int]]]],
    step: Callable[[], None],
) -> list[tuple[Tensor, list[list[int]]]]:
    """Counts by what two trial compressions, to a few slots per head, still lose. `docs/theory.md 5.3`.

    The trials' slots are at most a quarter and a half of the entries. Where the newest quarter of the text cannot judge them,
    the queries that were held out of the fit do.
    """
    entries = min(allot.room(scored.scores))
    few, many = (max(1, min(size, entries // part)) + scored.pinned for size, part in zip(method.trials, (4, 2), strict=True))
    if few >= many or many >= entries:
        for _ in observations:
            step()
        return list(allotted)
    uniform = replace(method, allot=allot.uniform)
    trials = [_allotted(scored, uniform, size * scored.heads) for size in (few, many)]
    losses: list[list[list[float]]] = [[] for _ in trials]
    for layer, observation in enumerate(observations):
        with_references = replace(observation, references=scored.references[layer])
        validation = scored.validations[layer]
        for (scores, counts), lost in zip(trials, losses, strict=True):
            choices = method.choose(with_references, _own(scores[layer], observation), counts[layer])
            merged = method.merge(with_references, choices)
            if validation is None:
                lost.append([head.error for head in merged])
            else:
                lost.append(validation.lost([choice.kept for choice in choices], merged, observation.positions))
        step()
    both = losses[0], losses[1]
    return [
        (scores, allot.by_loss((few, many), both, sum(map(sum, counts)), allot.room(scores), _most_fixed(scores)))
        for scores, counts in allotted
    ]


def _stored(observation: Observation, kept: Sequence[Tensor], merged: Sequence[Merged], slot_dtype: SlotDtype) -> Slots:
    """A layer's slots, flat, its heads one after the other."""
    counts = [len(head) for head in kept]
    return Slots(
        keys=slot_dtype.store_keys(torch.cat([head.keys for head in merged]).to(observation.keys.dtype), counts),
        values=slot_dtype.store_values(torch.cat([head.values for head in merged]).to(observation.values.dtype)),
        bias=torch.cat([head.bias for head in merged]).float(),
        positions=torch.cat([observation.positions[head, entries] for head, entries in enumerate(kept)]).int(),
        offsets=(0, *accumulate(counts)),
    )


def _unmerged(observations: Sequence[Observation], all_stay: bool, slot_dtype: SlotDtype) -> Compressed:
    """Nothing merged: all entries stay as they are, or none does."""
    layers = []
    for observation in observations:
        kept = tuple((head & all_stay).nonzero()[:, 0] for head in observation.present)
        merged = tuple(
            evict(observation.keys[head], observation.values[head], entries, observation.head_bias(head))
            for head, entries in enumerate(kept)
        )
        layers.append(_Layer(kept, merged, _stored(observation, kept, merged, slot_dtype)))
    return _compressed(layers)


def _price(layer_pairs: LayerPairs, observation: Observation, layers: int) -> float:
    """The bytes of a slot as a share of those of a slot that shares nothing."""
    vectors = sum(x.shape[2] * x.element_size() for x in (observation.keys, observation.values))
    return layer_pairs.cost(layers, vectors, BESIDE)


def _levelled(layers: Sequence[Tensor], fill: float) -> Tensor:
    """Layers [H, T_l] as one tensor [L, H, T], the shorter ones filled up in front."""
    most = max(layer.shape[1] for layer in layers)
    return torch.stack([pad(layer, (most - layer.shape[1], 0), value=fill) for layer in layers])


def _own(scores: Tensor, observation: Observation) -> Tensor:
    """A layer's own scores [H, its entries], without what fills up in front."""
    return scores[:, scores.shape[1] - observation.entries :]


def _most_fixed(scores: Tensor) -> int:
    """The most entries that a head must keep."""
    return int(scores.isposinf().sum(-1).max())


def _check_room(pinned: int, slots: int) -> None:
    """Raises BudgetError unless what must stay fits into a head's slots."""
    if pinned > slots:
        raise BudgetError(f"{pinned} tokens must stay in every head, but there are only {slots} slots: give a larger budget")


def _stepper(progress: Progress, of: int) -> Callable[[], None]:
    """What reports that one more of `of` steps is done."""
    numbers = count(1)
    return lambda: progress(next(numbers), of)


def in_row(progress: Progress, row: int, rows: int, done: int, of: int) -> None:
    """Progress in one of several rows of a batch, reported as that of all of them."""
    progress(row * of + done, rows * of)
