"""Joined: several documents in one prompt, as they are or repaired."""

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
from keepkv.documents.joining.cacheblend import BlendVariant, Recomputed, ReusedText, recompute
from keepkv.documents.joining.join import (
    Placement,
    check_movable,
    concatenated,
    join,
    joint_report,
    lead_slots,
    merge_lead,
    moved_slots,
    placements,
    shifted_keys,
)
from keepkv.errors import InputError
from keepkv.methods import Method
from keepkv.observe.bank import Bank
from keepkv.observe.watch import Watch
from keepkv.ops.rope import Rotation
from keepkv.recipe import Recipe
from keepkv.slots.slot_dtype import SLOT_DTYPES, SlotDtype
from keepkv.slots.slots import Slots


def joined(
    model: PreTrainedModel,
    parts: Sequence[Document],
    repair: float = 0.0,
    progress: Progress = lambda done, of: None,
    variant: BlendVariant = "repository",
    crafts: Sequence[Sequence[cachecraft.ChunkVariant]] = (),
    keys: Sequence[str] = (),
    budget: BudgetLike | None = None,
    method: str | Method = "keepkv",
) -> Document:
    """Several documents as one prompt, in that order, without reading them again.

    A document that was compiled alone knows nothing of those that now stand before it. `repair` reads some of its tokens again
    with the earlier documents in view. Compressed documents stay compressed, stored in the finest format among theirs. Where a
    token that is read again has a slot, the slot takes the fresh key, and its value moves by what the token's value changed.

    Args:
        model: The model that all documents were compiled with.
        parts: The documents.
        repair: The share of the later documents' tokens that is read again (CacheBlend, arXiv 2405.16444). It needs their
            exact keys and values (`Recipe.exact`), and their token ids.
        progress: Called with (documents done, documents in all).
        variant: How these tokens are chosen, see `cacheblend.recompute`.
        crafts: For each later document, how it once stood behind others (Cache-Craft, arXiv 2502.15734). The variants then say
            which tokens are read again, and `repair` is their largest share. For documents that are not compressed.
        keys: With crafts, the documents' names in them.
        budget: Compresses what was repaired, for documents that are not compressed. The queries that decide are those of the
            tokens that were read again.
        method: With a budget, the method.

    Returns:
        A document that is asked like any other. It has no `exact`.

    Raises:
        InputError: for documents that cannot be joined, repaired or compressed so; a model with sliding windows cannot repair.

    Examples:
        >>> from keepkv import Recipe, compile_text
        >>> from keepkv.models import loading
        >>> model, tokenizer = loading.load("smollm2")
        >>> texts = ["Anna was born in Oslo.", "Boris was born in Rome."]
        >>> parts = [compile_text(model, tokenizer, text, Recipe(method="full", exact=True)) for text in texts]
        >>> both = joined(model, parts, repair=0.2)
        >>> both.tokens == parts[0].tokens + parts[1].tokens - parts[1].lead
        True
    """
    if len(parts) == 1 or not repair:
        cache = join(model, [part.cache for part in parts], [part.lead for part in parts])
        progress(1, 1)
    else:
        cache = _repaired(model, parts, repair, variant, progress, crafts, keys)
    if budget is None:
        for layer in cache.keep_layers:
            layer.watch = None
        _store(cache, _finest(parts))
    elif not _uncompressed(cache) or any(layer.watch is None for layer in cache.keep_layers):
        raise InputError("only documents that are not compressed, and were repaired, can be compressed after they were joined")
    else:
        cache.restore(None)
        cache.compress(budget, method)
    ids = None
    if all(part.ids is not None for part in parts):
        ids = torch.cat([part.ids[:, part.lead if n else 0 :] for n, part in enumerate(parts) if part.ids is not None], 1)
    return replace(
        parts[0],
        cache=cache,
        ids=ids,
        source=", ".join(part.source for part in parts),
        reading_seconds=sum(part.reading_seconds for part in parts),
        exact=None,
    )


def _finest(parts: Sequence[Document]) -> SlotDtype:
    """The format in which no document's slots lose more than they have. One that was left whole is exact."""
    names = {part.cache.report().slot_dtype for part in parts}
    return next(slot_dtype for name, slot_dtype in SLOT_DTYPES.items() if name in names)


def _store(cache: KeepCache, slot_dtype: SlotDtype) -> None:
    """Stores the slots, which were read to be moved, in a format again."""
    for layer in cache.keep_layers if slot_dtype.rounds else ():
        if layer.slots:
            layer.slots = slot_dtype.stored(layer.slots)
    if cache.compressed:
        cache.restore(replace(cache.report(), slot_dtype=slot_dtype.name))


def _repaired(
    model: PreTrainedModel,
    parts: Sequence[Document],
    share: float,
    variant: BlendVariant,
    progress: Progress,
    crafts: Sequence[Sequence[cachecraft.ChunkVariant]],
    keys: Sequence[str],
) -> KeepCache:
    """One document behind the other in one cache, each repaired with those before it in view. Raises InputError."""
    cache = parts[0].cache.fork()
    check_movable(cache)
    if len(cache.keep_layers) < len(cache.layers):
        raise InputError(
            "not every layer of this model has full attention: joined documents cannot be repaired (drop --repair)"
        )
    places = placements([part.cache for part in parts], [part.lead for part in parts])
    for number, (document, place) in enumerate(zip(parts[1:], places[1:], strict=True)):
        if document.ids is None or not (document.exact or _uncompressed(document.cache)):
            raise InputError(
                f"{document.source or 'a document'} cannot be repaired: compile it with --exact (and not with --no-ids)"
            )
        chunk_variant = None
        chosen = None
        if crafts:
            if not _uncompressed(document.cache):
                raise InputError("a variant repairs a document that is not compressed: compile it with --method full")
            before = keys[: number + 1]
            chunk_variant = cachecraft.best(crafts[number], before)
            chosen = chunk_variant.chosen(before, share)
        seen, rotations = cache.get_seq_length(), cache.rotations
        exact = [_exact(document, chunk_variant, index, place, seen, rotation) for index, rotation in enumerate(rotations)]
        text = ReusedText(document.ids[:, place.lead :], exact.__getitem__)
        recomputed = recompute(model, cache, text, share, variant, chosen)
        cache = _appended(cache, document, place, exact, recomputed, rotations)
        progress(number + 1, len(parts) - 1)
    report = joint_report(places)
    cache.restore(replace(report, note=f"{report.note}, {100 * share:g}% read again"))
    return cache


def _exact(
    document: Document,
    chunk_variant: cachecraft.ChunkVariant | None,
    index: int,
    place: Placement,
    seen: int,
    rotation: Rotation,
) -> tuple[Tensor, Tensor]:
    """A layer's exact keys and values behind `seen` tokens, where the document stands now: its own, or a variant's."""
    if chunk_variant is not None:
        keys = chunk_variant.recomputed.keys[index]
        values = chunk_variant.recomputed.values[index]
        return shifted_keys(keys, seen - chunk_variant.start, rotation), values
    layer = document.cache.keep_layers[index]
    keys, values = document.exact(index) if document.exact else (layer.keys, layer.values)
    return shifted_keys(keys[:, :, place.lead :], place.shift, rotation), values[:, :, place.lead :]


def _appended(
    cache: KeepCache,
    document: Document,
    place: Placement,
    exact: Sequence[tuple[Tensor, Tensor]],
    recomputed: Recomputed,
    rotations: Sequence[Rotation],
) -> KeepCache:
    """The cache and behind it a document, in which what was read again has taken its place."""
    joint = cache.fork()
    dense = _uncompressed(cache) and _uncompressed(document.cache)
    for index, (layer, own) in enumerate(zip(joint.keep_layers, document.cache.keep_layers, strict=True)):
        taken = recomputed.taken[index]
        tokens = recomputed.tokens[taken]
        keys = recomputed.keys[index][:, :, taken]
        values = recomputed.values[index][:, :, taken]
        old_keys, old_values = exact[index]
        if dense:
            new_keys = old_keys.clone()
            new_values = old_values.clone()
            new_keys[:, :, tokens] = keys
            new_values[:, :, tokens] = values
            layer.watch = _watch_of(layer, index, recomputed, cache.recipe.seed)
            layer.keys = torch.cat([layer.keys, new_keys], 2)
            layer.values = torch.cat([layer.values, new_values], 2)
        else:
            start = layer.seen
            before = merge_lead(moved_slots(layer, Placement(cache, 0, 0), rotations[index]), lead_slots(own, place))
            slots = moved_slots(own, place, rotations[index])
            slots = _repaired_slots(slots, tokens + start, keys[0], values[0] - old_values[0][:, tokens])
            layer.slots = concatenated([before, slots])
            layer.keys = layer.keys[:, :, :0]
            layer.values = layer.values[:, :, :0]
        layer.seen += old_keys.shape[2]
    return joint


def _watch_of(layer: KeepLayer, index: int, recomputed: Recomputed, seed: int) -> Watch | None:
    """The queries of the tokens that were read again, for a later compression; before they are added to the layer."""
    if not recomputed.queries:
        return layer.watch
    queries = recomputed.queries[index][0]
    grouped = queries.reshape(layer.heads, -1, *queries.shape[1:])
    new = Watch(index, Recipe.references, seed, False, recomputed.scale, starts=(0,), softmax=recomputed.softmax[index])
    watch = layer.watch or new
    bank = watch.banks[0] if watch.banks else Bank(grouped[:, :, :0], recomputed.tokens[:0])
    return replace(watch, banks=(bank.add(grouped, recomputed.tokens + layer.seen, watch.limit, seed),))


def _repaired_slots(slots: Slots, positions: Tensor, keys: Tensor, change: Tensor) -> Slots:
    """Slots whose token was read again: the fresh key [H, m, d], and the value moved by the token's change [H, m, d_v]."""
    new_keys = slots.keys[:].clone()
    new_values = slots.values[:].clone()
    for head, (lo, hi) in enumerate(zip(slots.offsets, slots.offsets[1:], strict=False)):
        own = slots.positions[lo:hi].long()
        where = torch.searchsorted(positions, own).clamp(max=len(positions) - 1)
        hit = positions[where] == own
        new_keys[lo:hi][hit] = keys[head, where[hit]].to(new_keys.dtype)
        new_values[lo:hi][hit] += change[head, where[hit]].to(new_values.dtype)
    return replace(slots, keys=new_keys, values=new_values)


def _uncompressed(cache: KeepCache) -> bool:
    return all(layer.slots is None for layer in cache.keep_layers)
