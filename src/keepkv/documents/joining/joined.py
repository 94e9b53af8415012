"""Documents joined in one prompt, as they are or repaired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.budget import BudgetLike
from keepkv.cache import KeepCache
from keepkv.cache.layer import KeepLayer
from keepkv.compress import Progress
from keepkv.documents.document import Document
from keepkv.documents.joining import cachecraft
from keepkv.documents.joining.cacheblend import Renewed, Text, Variant, renew
from keepkv.documents.joining.join import Part, check, join, leading, moved, placed, report_of, slots_of, stacked, with_lead
from keepkv.errors import InputError
from keepkv.methods import Method
from keepkv.observe.bank import Bank
from keepkv.observe.watch import Watch
from keepkv.slots.quantized import SLOT_DTYPES, SlotDtype
from keepkv.slots.slots import Slots

REFERENCES = 2048  # queries that are remembered at most for a compression


def joined(
    model: PreTrainedModel, parts: Sequence[Document], repair: float = 0.0,
    progress: Progress = lambda done, of: None, variant: Variant = "repository",
    crafts: Sequence[Sequence[cachecraft.Variant]] = (), keys: Sequence[str] = (),
    budget: BudgetLike | None = None, method: str | Method = "keepkv",
) -> Document:  # fmt: skip
    """Several documents as one prompt, in that order. repair: the share of the later documents' tokens that is read again with
    the earlier ones in view (CacheBlend); it needs each later document's exact keys and values (compile --exact).

    crafts: how each later document stood behind others before (Cache-Craft), with keys, the documents' names there: then the
    variants say which tokens are read again, and repair only bounds their share; for documents that are not compressed.

    budget, method: compresses what was repaired, for documents that are not compressed; the context queries are those of the
    tokens that were read again.

    Compressed documents stay compressed, and quantized if all are so in one way: of a token that was read again and has a slot,
    the slot takes the fresh key, and its value moves by what the token's value changed. Raises InputError for a model without
    full attention in every layer.
    """
    caches, leads = [part.cache for part in parts], [part.lead for part in parts]
    if len(parts) == 1 or not repair:
        cache = join(model, caches, leads)
        progress(1, 1)
    else:
        cache = _repaired(model, parts, repair, variant, progress, crafts, keys)
    if budget is None:
        for layer in cache.keep_layers:
            layer.watch = None
    elif not _whole(cache) or any(layer.watch is None for layer in cache.keep_layers):
        raise InputError("only documents that are not compressed, and were repaired, can be compressed after they were joined")
    else:
        cache.restore(None)
        cache.compress(budget, method)
    slot_dtypes = {part.cache.report().slot_dtype for part in parts}
    if len(slot_dtypes) == 1:
        _store(cache, SLOT_DTYPES[slot_dtypes.pop()])
    ids = None
    if all(part.ids is not None for part in parts):
        ids = torch.cat([part.ids[:, part.lead if n else 0 :] for n, part in enumerate(parts) if part.ids is not None], 1)
    return replace(parts[0], cache=cache, ids=ids, source=", ".join(part.source for part in parts), exact=None)


def _store(cache: KeepCache, slot_dtype: SlotDtype) -> None:
    """Stores the slots, which were read to be moved, in a format again."""
    for layer in cache.keep_layers if slot_dtype.bits else ():
        slots = layer.slots
        layer.slots = slots and replace(slots, keys=slot_dtype.store(slots.keys[:]), values=slot_dtype.store(slots.values[:]))
    if cache.compressed:
        cache.restore(replace(cache.report(), slot_dtype=slot_dtype.name))


def _repaired(
    model: PreTrainedModel, parts: Sequence[Document], share: float, variant: Variant, progress: Progress,
    crafts: Sequence[Sequence[cachecraft.Variant]], keys: Sequence[str],
) -> KeepCache:  # fmt: skip
    check(model)
    cache = parts[0].cache.fork()
    if len(cache.keep_layers) < len(cache.layers):
        raise InputError("this model has sliding windows: its joined documents cannot be repaired (join them without --repair)")
    inv_freq = cache.inv_freq
    places = placed([part.cache for part in parts], [part.lead for part in parts])
    for number, (document, place) in enumerate(zip(parts[1:], places[1:], strict=True)):
        if document.ids is None or not (document.exact or _whole(document.cache)):
            raise InputError(
                f"{document.source or 'a document'} cannot be repaired: compile it with --exact (and not with --no-ids)"
            )
        chosen, stood = None, None
        if crafts:
            if not _whole(document.cache):
                raise InputError("a variant repairs a document that is not compressed: compile it with --method full")
            stood = cachecraft.best(crafts[number], keys[: number + 1])
            chosen = stood.chosen(keys[: number + 1], share)
        exact = [_exact(document, stood, index, place, cache, inv_freq) for index in range(len(cache.layers))]
        renewed = renew(model, cache, Text(document.ids[:, place.lead :], exact.__getitem__), share, variant, chosen)
        cache = _appended(cache, document, place, exact, renewed, inv_freq)
        progress(number + 1, len(parts) - 1)
    whole = report_of(places)
    cache.restore(replace(whole, note=f"{whole.note}, {100 * share:g}% read again"))
    return cache


def _exact(
    document: Document, stood: cachecraft.Variant | None, index: int, place: Part, cache: KeepCache, inv_freq: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A layer's exact keys and values where the document stands now: its own without the lead, or a variant's."""
    if stood is not None:
        keys, values, shift = stood.renewed.keys[index], stood.renewed.values[index], cache.get_seq_length() - stood.start
    else:
        layer, lead = document.cache.keep_layers[index], place.lead
        both = document.exact(index) if document.exact else (layer.keys, layer.values)
        (keys, values), shift = (x[:, :, lead:] for x in both), place.shift
    return moved(keys, shift, inv_freq), values


def _appended(
    cache: KeepCache, document: Document, place: Part, exact: Sequence[tuple[Tensor, Tensor]], renewed: Renewed,
    inv_freq: Tensor,
) -> KeepCache:  # fmt: skip
    """The cache and behind it a document, with what was read again in its place."""
    after = cache.fork()
    dense = _whole(cache) and _whole(document.cache)
    for index, (layer, own) in enumerate(zip(after.keep_layers, document.cache.keep_layers, strict=True)):
        taken = renewed.taken[index]
        tokens = renewed.tokens[taken]
        keys, values = renewed.keys[index][:, :, taken], renewed.values[index][:, :, taken]
        old_keys, old_values = exact[index]
        if dense:
            new_keys, new_values = old_keys.clone(), old_values.clone()
            new_keys[:, :, tokens], new_values[:, :, tokens] = keys, values
            layer.watch = _watched(layer, index, renewed, cache.recipe.seed)
            layer.keys, layer.values = torch.cat([layer.keys, new_keys], 2), torch.cat([layer.values, new_values], 2)
        else:
            start = layer.seen
            before = with_lead(slots_of(layer, Part(cache, 0, 0), inv_freq), leading(own, place))
            slots = slots_of(own, place, inv_freq)
            slots = _mended(slots, tokens + start, keys[0], values[0] - old_values[0][:, tokens])
            layer.slots = stacked([before, slots])
            layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
        layer.seen += old_keys.shape[2]
    return after


def _watched(layer: KeepLayer, index: int, renewed: Renewed, seed: int) -> Watch | None:
    """What the tokens that were read again asked, for a later compression; before they are added to the layer."""
    if not renewed.queries:
        return layer.watch
    asked = renewed.queries[index][0]
    grouped = asked.reshape(layer.heads, -1, *asked.shape[1:])
    watch = layer.watch or Watch(index, REFERENCES, seed, False, renewed.scale, starts=(0,))
    empty = Bank(grouped[:, :, :0], renewed.tokens[:0])
    bank = (watch.banks[0] if watch.banks else empty).add(grouped, renewed.tokens + layer.seen, watch.limit, seed)
    return replace(watch, banks=(bank,))


def _mended(slots: Slots, positions: Tensor, keys: Tensor, change: Tensor) -> Slots:
    """Slots whose token was read again: the fresh key [H, m, d], and the value moved by the token's change [H, m, d_v]."""
    new_keys, new_values = slots.keys[:].clone(), slots.values[:].clone()
    for head, (lo, hi) in enumerate(zip(slots.offsets, slots.offsets[1:], strict=False)):
        own = slots.positions[lo:hi].long()
        where = torch.searchsorted(positions, own).clamp(max=len(positions) - 1)
        hit = positions[where] == own
        new_keys[lo:hi][hit] = keys[head, where[hit]].to(new_keys.dtype)
        new_values[lo:hi][hit] += change[head, where[hit]].to(new_values.dtype)
    return replace(slots, keys=new_keys, values=new_values)


def _whole(cache: KeepCache) -> bool:
    return all(layer.slots is None for layer in cache.keep_layers)
