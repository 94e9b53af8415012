"""Join: caches of texts that were read alone, one behind the other in one cache.

A key at position p that moves to p + s is rotated by R(s). That is exact, since R(p + s) = R(s) R(p) (docs/theory.md 1.6).
Votes and values stay: a slot is to a later query what it was, at the distance that it has now. What the chat template puts
before every text is kept once. The attention sinks are in it, and it keeps the votes that they have from every text
(`merge_lead`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.cache import KeepCache
from keepkv.cache.layer import KeepLayer
from keepkv.cache.other_layers import has_state, has_window
from keepkv.cache.report import Head, Report
from keepkv.errors import InputError
from keepkv.ops.rope import Rotation
from keepkv.slots.slots import Slots


class Placement(NamedTuple):
    """A text's place in the joined prompt.

    Attributes:
        cache: Has read the text.
        lead: How many of its first tokens are left out: what the chat template puts before it.
        shift: By how many positions the others move.
    """

    cache: KeepCache
    lead: int
    shift: int

    @property
    def end(self) -> int:
        """The position behind its last token."""
        return self.shift + self.cache.get_seq_length()


def placements(caches: Sequence[KeepCache], leads: Sequence[int]) -> list[Placement]:
    """Where every cache goes: the first stays as it is, and the others follow without their lead.

    Raises:
        InputError: for a text that is nothing but its lead.
    """
    places: list[Placement] = []
    for cache, lead in zip(caches, leads, strict=True):
        place = Placement(cache, lead, places[-1].end - lead) if places else Placement(cache, 0, 0)
        places.append(place)
    if any(place.cache.get_seq_length() <= place.lead for place in places):
        raise InputError("one of the documents has no text of its own: there is nothing to join")
    return places


def join(model: PreTrainedModel, caches: Sequence[KeepCache], leads: Sequence[int]) -> KeepCache:
    """One cache of all texts, in that order.

    The last text's exact tail stays a tail. The others' tails become slots of one vote, unless nothing is compressed at all.

    Args:
        model: The model that all caches were made for.
        caches: One row each.
        leads: How many tokens the chat template puts before each text.

    Raises:
        InputError: for rotary frequencies that depend on the length, for layers with a state, and for a text that is nothing
            but its lead.
    """
    joint = KeepCache(model, 1.0, "full", auto=False)
    check_movable(joint)
    places = placements(caches, leads)
    for index, (layer, rotation) in enumerate(zip(joint.layers, joint.rotations, strict=True)):
        layers = [place.cache.layers[index] for place in places]
        if isinstance(layer, KeepLayer):
            _join_layers(layer, layers, places, rotation)
        elif has_window(layer):
            _join_windows(layer, layers, places, rotation)
    joint.restore(joint_report(places))
    return joint


def check_movable(cache: KeepCache) -> None:
    """Raises InputError for a model whose texts cannot be put together.

    That is, if its rotary frequencies depend on the length, or if a layer has a state that every token changes.
    """
    if any(map(has_state, cache.layers)):
        raise InputError(
            "this model has layers with a state that every token changes (linear attention, Mamba, a convolution): the states "
            "of two texts cannot be joined, read the texts one behind the other"
        )
    if not cache.rotaries.fixed:
        raise InputError(
            "this model's rotary frequencies change with the length (rope type dynamic or longrope): joined documents would "
            "not stand where their keys say"
        )


def shifted_keys(keys: Tensor, shift: int, rotation: Rotation) -> Tensor:
    """Keys [..., n, d] rotated by `shift` positions, in float32 or better."""
    if not shift or not keys.shape[-2]:
        return keys
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    return rotation.rotate(wide, torch.full((keys.shape[-2],), shift, device=keys.device)).to(keys.dtype)


def lead_slots(layer: KeepLayer, place: Placement) -> Slots | None:
    """The slots of a text's lead, which stays where it is; None where nothing is compressed or the lead is kept."""
    if layer.slots is None or not place.lead:
        return None
    slots = layer.slots.read()
    counts = [int((positions < place.lead).sum()) for positions in torch.split(slots.positions, slots.counts)]
    stay = slots.positions < place.lead
    return Slots(slots.keys[stay], slots.values[stay], slots.bias[stay], slots.positions[stay], (0, *accumulate(counts)))


class _HeadSlots(NamedTuple):
    """One head's slots: keys [n, d], values [n, d_v], bias and positions [n]."""

    keys: Tensor
    values: Tensor
    bias: Tensor
    positions: Tensor

    def to_slots(self) -> Slots:
        return Slots(*self, offsets=(0, len(self.bias)))


def _heads(slots: Slots) -> list[_HeadSlots]:
    positions = torch.split(slots.positions, slots.counts)
    return [_HeadSlots(*head, own) for head, own in zip(slots.per_head, positions, strict=True)]


def merge_lead(first: Slots, lead: Slots | None) -> Slots:
    """The first text's slots, with what another text's lead stood for beside itself.

    The lead's tokens are the same in both texts and count once. But a slot of p votes stands for p - 1 tokens' worth of
    attention to the other text too, and attention sinks have taken over much of it. So votes add up, p₁ + max(p₂ - 1, 0), and
    values are means, weighted by votes. A token that has a slot in the other text only gets one.
    """
    if lead is None or not len(lead.bias):
        return first
    heads = []
    for ours, theirs in zip(_heads(first), _heads(lead), strict=True):
        same = ours.positions[:, None] == theirs.positions
        more = (theirs.bias.double().exp() - 1).clamp(min=0)
        votes = ours.bias.double().exp()
        added = same.double() @ more
        total = votes + added
        values = votes[:, None] * ours.values.double() + same.double() @ (more[:, None] * theirs.values.double())
        values = values / total[:, None]
        hit = added > 0
        ours = ours._replace(
            values=torch.where(hit[:, None], values.to(ours.values.dtype), ours.values),
            bias=torch.where(hit, total.log().float(), ours.bias),
        )
        alone = ~same.any(0)
        together = _HeadSlots(*(torch.cat([own, other[alone]]) for own, other in zip(ours, theirs, strict=True)))
        order = together.positions.argsort(stable=True)
        heads.append(_HeadSlots(*(x[order] for x in together)).to_slots())
    return Slots.cat(heads)


def moved_slots(layer: KeepLayer, place: Placement, rotation: Rotation, tail: bool = True) -> Slots:
    """What a layer holds, moved to its place, without the lead: its slots and, if wanted, its tail as slots of one vote."""
    first = layer.seen - layer.tail  # position of the tail's first token
    skip = max(0, place.lead - first)
    none = torch.zeros(0, device=layer.keys.device)
    slots = _heads(layer.slots.read()) if layer.slots is not None else None
    heads = []
    for head in range(layer.heads):
        pieces = [_HeadSlots(layer.keys[0, head, :0], layer.values[0, head, :0], none, none.int())]
        if slots is not None:
            stay = slots[head].positions >= place.lead
            pieces.append(_HeadSlots(*(x[stay] for x in slots[head])))
        if tail:
            positions = torch.arange(first + skip, layer.seen, dtype=torch.int32, device=layer.keys.device)
            bias = torch.zeros(len(positions), device=layer.keys.device)
            pieces.append(_HeadSlots(layer.keys[0, head, skip:], layer.values[0, head, skip:], bias, positions))
        together = _HeadSlots(*(torch.cat(x) for x in zip(*pieces, strict=True)))
        moved = together._replace(
            keys=shifted_keys(together.keys, place.shift, rotation), positions=together.positions + place.shift
        )
        heads.append(moved.to_slots())
    return Slots.cat(heads)


def concatenated(parts: Sequence[Slots]) -> Slots:
    """Slots of one layer and row, one part behind the other in every head."""
    heads = range(len(parts[0].counts))
    together = Slots.cat([part._part(head, head + 1) for head in heads for part in parts])
    return replace(together, offsets=(0, *accumulate(sum(part.counts[head] for part in parts) for head in heads)))


def _join_layers(layer: KeepLayer, layers: Sequence[KeepLayer], places: Sequence[Placement], rotation: Rotation) -> None:
    """Fills a layer with full attention with what the texts' layers hold."""
    layer.lazy_initialization(layers[0].keys, layers[0].values)
    layer.seen = places[-1].end
    pairs = list(zip(layers, places, strict=True))
    if all(each.slots is None for each in layers):
        layer.keys = torch.cat([shifted_keys(each.keys[:, :, p.lead :], p.shift, rotation) for each, p in pairs], 2)
        layer.values = torch.cat([each.values[:, :, p.lead :] for each, p in pairs], 2)
        return
    last = layers[-1]
    slots = [moved_slots(each, place, rotation, tail=each is not last) for each, place in pairs]
    for each, place in pairs:
        slots[0] = merge_lead(slots[0], lead_slots(each, place))
    layer.slots = concatenated(slots)
    skip = max(0, places[-1].lead - (last.seen - last.tail))
    layer.keys = shifted_keys(last.keys[:, :, skip:], places[-1].shift, rotation)
    layer.values = last.values[:, :, skip:]


def _join_windows(layer: Any, layers: Sequence[Any], places: Sequence[Placement], rotation: Rotation) -> None:
    """Fills a layer with a sliding window with the newest tokens of all texts."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for each, place in zip(layers, places, strict=True):
        first = place.cache.get_seq_length() - each.keys.shape[2]  # position of the window's first token
        skip = max(0, place.lead - first)
        if skip == 0 and place.lead < first:  # what is older has passed
            keys.clear()
            values.clear()
        keys.append(shifted_keys(each.keys[:, :, skip:], place.shift, rotation))
        values.append(each.values[:, :, skip:])
    layer.lazy_initialization(keys[0], values[0])
    layer.keys = torch.cat(keys, dim=2)[:, :, 1 - layer.sliding_window :].clone()
    layer.values = torch.cat(values, dim=2)[:, :, 1 - layer.sliding_window :].clone()
    layer.cumulative_length = places[-1].end


def joint_report(places: Sequence[Placement]) -> Report:
    """The texts' reports as one: seconds are sums, errors are means."""
    reports = [place.cache.report() for place in places]
    tokens = (places[-1].end,)
    if len(reports) == 1:
        return replace(reports[0], tokens=tokens, slot_dtype="float")  # slots were read to be moved
    report = Report(
        method=", ".join(dict.fromkeys(report.method for report in reports)),
        budget=", ".join(dict.fromkeys(report.budget for report in reports)),
        tokens=tokens,
        compress_seconds=sum(report.compress_seconds for report in reports),
        repeat_seconds=sum(report.repeat_seconds for report in reports),
        longest_pause=max(report.longest_pause for report in reports),
        compressions=sum(report.compressions for report in reports),
        note=f"{len(reports)} joined",
    )
    if not all(report.heads for report in reports):
        return report
    layers = zip(*(report.heads[0] for report in reports), strict=True)
    heads = tuple(tuple(_joint_head(heads) for heads in zip(*layer, strict=True)) for layer in layers)
    return replace(report, heads=(heads,))


def _joint_head(heads: Sequence[Head]) -> Head:
    return Head(
        slots=sum(head.slots for head in heads),
        error=fmean(head.error for head in heads),
        mass_error=fmean(head.mass_error for head in heads),
        evict_error=fmean(head.evict_error for head in heads),
        fallbacks=sum(head.fallbacks for head in heads),
        max_vote=max(head.max_vote for head in heads),
    )
