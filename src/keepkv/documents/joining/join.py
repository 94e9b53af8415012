"""Join: caches of texts that were read alone, one behind the other in one cache.

A key at position p that moves to p + s is rotated by R(s): exact, since R(p + s) = R(s) R(p). Votes and values stay: a slot is
to a later query what it was, at the distance it has now. What the chat template puts before every text is kept once, with the
attention sinks among it, and with the votes that they have from every text (`with_lead`).
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
from keepkv.cache.report import Head, Report
from keepkv.errors import InputError
from keepkv.ops.rope import rotate
from keepkv.slots.slots import Slots


class Part(NamedTuple):
    """A cache of one text, its first `lead` tokens not wanted, and how far the others move."""

    cache: KeepCache
    lead: int
    shift: int


def placed(caches: Sequence[KeepCache], leads: Sequence[int]) -> list[Part]:
    """Where every cache goes: the first stays as it is, the others follow without their lead.

    Raises InputError for a text that is nothing but its lead.
    """
    parts, end = [], 0
    for number, (cache, lead) in enumerate(zip(caches, leads, strict=True)):
        lead = lead if number else 0
        parts.append(Part(cache, lead, end - lead))
        end += cache.get_seq_length() - lead
    if any(part.cache.get_seq_length() <= part.lead for part in parts):
        raise InputError("one of the documents has no text of its own: there is nothing to join")
    return parts


def join(model: PreTrainedModel, caches: Sequence[KeepCache], leads: Sequence[int]) -> KeepCache:
    """One cache of all texts in that order; caches of one row each, leads: how many tokens the template puts before each.

    The newest text's exact tail stays a tail; the others' become slots of one vote, unless nothing is compressed at all.
    Raises InputError for rotary frequencies that depend on the length, and for a text that is nothing but its lead.
    """
    check(model)
    parts = placed(caches, leads)
    joined = KeepCache(model, 1.0, "full", auto=False)
    total = parts[-1].shift + parts[-1].cache.get_seq_length()
    full, local = joined.inv_freq, joined.local_inv_freq
    for index, layer in enumerate(joined.layers):
        old = [part.cache.layers[index] for part in parts]
        if isinstance(layer, KeepLayer):
            _stack(layer, old, parts, full, total)
        else:
            _window(layer, old, parts, local, total)
    joined.restore(report_of(parts))
    return joined


def check(model: PreTrainedModel) -> None:
    """Raises InputError if the model's rotary frequencies depend on the length: its keys cannot be moved."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = {x.get("rope_type") for x in (rope, *rope.values()) if isinstance(x, dict)}
    if kinds & {"dynamic", "longrope"}:
        raise InputError(
            f"this model's rotary frequencies change with the length ({', '.join(map(str, kinds))}): joined documents "
            "would not stand where their keys say"
        )


def moved(keys: Tensor, shift: int, inv_freq: Tensor) -> Tensor:
    """Keys [..., n, d] rotated by `shift` positions, in float32 or better."""
    if not shift or not keys.shape[-2]:
        return keys
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    return rotate(wide, torch.full((keys.shape[-2],), shift, device=keys.device), inv_freq.to(keys.device)).to(keys.dtype)


def leading(layer: KeepLayer, part: Part) -> Slots | None:
    """The slots of a text's lead, which stays where it is; None where nothing is compressed or the lead is kept."""
    if layer.slots is None or not part.lead:
        return None
    own = layer.slots.read()
    counts = [int((positions < part.lead).sum()) for positions in torch.split(own.positions, own.counts)]
    stay = own.positions < part.lead
    return Slots(own.keys[stay], own.values[stay], own.bias[stay], own.positions[stay], (0, *accumulate(counts)))


def with_lead(first: Slots, lead: Slots | None) -> Slots:
    """The first text's slots with what another text's lead stood for beside itself.

    The lead's tokens are the same in both and count once; but a slot of p votes stands for p - 1 tokens' worth of attention to
    the other text too, and attention sinks have taken over much of it. So votes add up, p_1 + max(p_2 - 1, 0), and values are
    their means, weighted by votes; what has a slot in the other text only gets one.
    """
    if lead is None or not len(lead.bias):
        return first
    heads = []
    for one, two in zip(_heads(first), _heads(lead), strict=True):
        more = (two[2].double().exp() - 1).clamp(min=0)
        same = one[3][:, None] == two[3]
        votes = one[2].double().exp()
        added = same.double() @ more
        total = votes + added
        values = (votes[:, None] * one[1].double() + same.double() @ (more[:, None] * two[1].double())) / total[:, None]
        hit = (added > 0)[:, None]
        mixed = (one[0], torch.where(hit, values.to(one[1].dtype), one[1]), torch.where(hit[:, 0], total.log().float(), one[2]))
        alone = ~same.any(0)
        parts = [torch.cat([a, b[alone]]) for a, b in zip((*mixed, one[3]), two, strict=True)]
        order = parts[3].argsort(stable=True)
        keys, values, bias, positions = (x[order] for x in parts)
        heads.append(Slots(keys, values, bias, positions, (0, len(bias))))
    return Slots.cat(heads)


def _heads(slots: Slots) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    places = torch.split(slots.positions, slots.counts)
    return [(*head, positions) for head, positions in zip(slots.per_head, places, strict=True)]


def slots_of(layer: KeepLayer, part: Part, inv_freq: Tensor, tail: bool = True) -> Slots:
    """What a layer holds, moved, without the lead: its slots and, if wanted, its tail as slots of one vote."""
    heads = []
    first = layer.seen - layer.tail
    skip = max(0, part.lead - first)
    own = layer.slots.read() if layer.slots is not None else None
    none = torch.zeros(0, device=layer.keys.device)
    for head in range(layer.heads):
        pieces = [(layer.keys[0, head, :0], layer.values[0, head, :0], none, none.int())]
        if own is not None:
            (keys, values, bias), positions = own.per_head[head], torch.split(own.positions, own.counts)[head]
            stay = positions >= part.lead
            pieces.append((keys[stay], values[stay], bias[stay], positions[stay]))
        if tail:
            places = torch.arange(first + skip, layer.seen, dtype=torch.int32, device=layer.keys.device)
            votes = torch.zeros(len(places), device=layer.keys.device)
            pieces.append((layer.keys[0, head, skip:], layer.values[0, head, skip:], votes, places))
        keys, values, bias, positions = (torch.cat(x) for x in zip(*pieces, strict=True))
        heads.append(Slots(moved(keys, part.shift, inv_freq), values, bias, positions + part.shift, (0, len(bias))))
    return Slots.cat(heads)


def stacked(parts: Sequence[Slots]) -> Slots:
    """Slots of one layer and row, part behind part, in every head."""
    heads = range(len(parts[0].counts))
    together = Slots.cat([part._part(head, head + 1) for head in heads for part in parts])
    return replace(together, offsets=(0, *accumulate(sum(part.counts[head] for part in parts) for head in heads)))


def _stack(layer: KeepLayer, old: Sequence[KeepLayer], parts: Sequence[Part], inv_freq: Tensor, total: int) -> None:
    layer.lazy_initialization(old[0].keys, old[0].values)
    layer.seen = total
    if all(each.slots is None for each in old):
        layer.keys = torch.cat([moved(o.keys[:, :, p.lead :], p.shift, inv_freq) for o, p in zip(old, parts, strict=True)], 2)
        layer.values = torch.cat([o.values[:, :, p.lead :] for o, p in zip(old, parts, strict=True)], 2)
        return
    pairs, last = list(zip(old, parts, strict=True)), old[-1]
    slots = [slots_of(each, part, inv_freq, tail=each is not last) for each, part in pairs]
    for each, part in pairs:
        slots[0] = with_lead(slots[0], leading(each, part))
    layer.slots = stacked(slots)
    skip = max(0, parts[-1].lead - (last.seen - last.tail))
    layer.keys, layer.values = moved(last.keys[:, :, skip:], parts[-1].shift, inv_freq), last.values[:, :, skip:]


def _window(layer: Any, old: Sequence[Any], parts: Sequence[Part], inv_freq: Tensor, total: int) -> None:
    """A sliding window over the joined texts: the newest tokens of them all."""
    keys, values = [], []
    for each, part in zip(old, parts, strict=True):
        skip = max(0, part.lead - (part.cache.get_seq_length() - each.keys.shape[2]))
        keys.append(moved(each.keys[:, :, skip:], part.shift, inv_freq))
        values.append(each.values[:, :, skip:])
        if skip == 0 and part.lead < part.cache.get_seq_length() - each.keys.shape[2]:  # what is older has passed
            keys, values = keys[-1:], values[-1:]
    layer.lazy_initialization(keys[0], values[0])
    layer.keys, layer.values = (torch.cat(x, dim=2)[:, :, 1 - layer.sliding_window :].clone() for x in (keys, values))
    layer.cumulative_length = total


def report_of(parts: Sequence[Part]) -> Report:
    """The parts' reports together."""
    total = parts[-1].shift + parts[-1].cache.get_seq_length()
    reports = [part.cache.report() for part in parts]
    methods, budgets = (list(dict.fromkeys(getattr(r, name) for r in reports)) for name in ("method", "budget"))
    first = Report(", ".join(methods), ", ".join(budgets), (total,), note="" if len(parts) == 1 else f"{len(parts)} joined")
    if not all(report.heads for report in reports):
        return first
    layers = zip(*(report.heads[0] for report in reports), strict=True)
    heads = tuple(tuple(_together(each) for each in zip(*layer, strict=True)) for layer in layers)
    return replace(first, heads=(heads,))


def _together(heads: Sequence[Head]) -> Head:
    return Head(
        slots=sum(head.slots for head in heads),
        error=fmean(head.error for head in heads),
        mass_error=fmean(head.mass_error for head in heads),
        evict_error=fmean(head.evict_error for head in heads),
        fallbacks=sum(head.fallbacks for head in heads),
        max_vote=max(head.max_vote for head in heads),
    )
