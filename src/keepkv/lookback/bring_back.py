"""Bringing spans of a text back into a fork of its compact cache: their exact keys and values, or their tokens read again.

What comes back stands in the fork's tail, before the newer tokens. The tail is dense and exact, in every head and whatever the
slots are stored as, and attention does not ask for the order of what came before. Slots whose keys come from a token that is
back are left out: that token is there now, whole. What such a slot stood for besides is not spread over others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from keepkv.cache import KeepCache
from keepkv.cache.layer import KeepLayer
from keepkv.cache.other_layers import has_window
from keepkv.errors import KeepKVError
from keepkv.lookback.spans import Span, count
from keepkv.slots.slots import Slots

RUN_UP = 32  # tokens before a span that are read with it and not kept: its first tokens need their neighbors, see docs/notes
States = Sequence[tuple[Tensor, Tensor]]  # for every layer with full attention, keys and values [1, H, n, ...]
# The states of disjoint spans, in order, of what a compact cache has read.
Source = Callable[[KeepCache, Sequence[Span]], States]


def brought_back(cache: KeepCache, spans: Sequence[Span], source: Source) -> KeepCache:
    """A fork of a compact cache that holds some spans of its text exactly, beside the slots of the others.

    The fork is for an answer: it does not compress what it reads. The cache is not changed.

    Args:
        cache: A compact cache of one row.
        spans: Disjoint, in order, and all before the tokens that the cache holds exactly.
        source: Where the keys and values come from: `tokens` or `exact`.

    Raises:
        KeepKVError: for a batch, and what the source raises.
    """
    if len(cache.starts) != 1:
        raise KeepKVError(f"spans are brought back into a cache of one row, got {len(cache.starts)}")
    twin = cache.fork()
    twin.auto = False
    if not spans:
        return twin
    for layer, (keys, values) in zip(twin.keep_layers, source(cache, spans), strict=True):
        if layer.slots is None:
            raise KeepKVError("nothing in this cache was compressed, so nothing can be brought back")
        _hold(layer, without(layer.slots, spans), keys, values)
    return twin


def exact(whole: KeepCache) -> Source:
    """The source of exact keys and values: a cache that has read the text and was not compressed, or one with a backing.

    Raises:
        KeepKVError: when it is asked for tokens that this cache does not hold.
    """

    def states(cache: KeepCache, spans: Sequence[Span]) -> States:
        return [_gathered(layer, spans) for layer in whole.keep_layers]

    return states


def tokens(model: PreTrainedModel, ids: Tensor) -> Source:
    """The source that reads the spans' tokens again, at their own positions, over the slots and the spans before them.

    The 32 tokens before a span are read with it, and not kept, so that its first tokens see their neighbors. In a layer with a
    sliding window they would see nothing before these. So the tokens of one window before them are read first, and forgotten
    by the other layers. A layer with a recurrent state starts from the state behind the whole text, of which it changes a copy:
    what it was at a span is not known. REFORM (arXiv 2506.01215) reads gathered tokens again, too.

    Args:
        model: The cache's model.
        ids: Token ids [1, T] of what the cache has read.
    """

    def read(cache: KeepCache, first: int, last: int) -> KeepCache:
        for piece in torch.split(ids[:, first:last].to(model.device), cache.chunk or last - first, 1):
            model(piece, past_key_values=cache, logits_to_keep=1)
        return cache

    def states(cache: KeepCache, spans: Sequence[Span]) -> States:
        window = max((layer.sliding_window for layer in cache.layers if has_window(layer)), default=0)
        back: States = [(layer.keys[:, :, :0], layer.values[:, :, :0]) for layer in cache.keep_layers]
        for number, (first, last) in enumerate(spans):
            begin = max(0, first - RUN_UP)
            twin = _as_of(cache, begin, spans[:number], back)
            if window and begin:
                start = max(0, begin - window)
                passed = read(_as_of(cache, start, spans[:number], back), start, begin)
                pairs = zip(twin.layers, passed.layers, strict=True)
                twin.layers = [ours if isinstance(ours, KeepLayer) else theirs for ours, theirs in pairs]
            again = [_newest(layer, last - first) for layer in read(twin, begin, last).keep_layers]
            back = [(torch.cat([a, c], 2), torch.cat([b, d], 2)) for (a, b), (c, d) in zip(back, again, strict=True)]
        return back

    return states


def _newest(layer: KeepLayer, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the newest tokens."""
    return layer.keys[:, :, -count:], layer.values[:, :, -count:]


def _as_of(cache: KeepCache, begin: int, spans: Sequence[Span], back: States) -> KeepCache:
    """A fork as of before token `begin`: the slots before it, and of the `spans` that are back what stands before it."""
    twin = cache.fork()
    twin.auto = False
    twin.layers = [_Begun(layer.sliding_window, begin) if has_window(layer) else layer for layer in twin.layers]
    size = count([(first, min(last, begin)) for first, last in spans if first < begin])
    for layer, (keys, values) in zip(twin.keep_layers, back, strict=True):
        slots = layer.slots and without(layer.slots, [*spans, (begin, layer.seen)])
        layer.seen = begin
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
        _hold(layer, slots, keys[:, :, :size], values[:, :, :size])
    return twin


class _Begun(DynamicSlidingWindowLayer):
    """A sliding window that is as after `seen` tokens, and holds none of them."""

    def __init__(self, window: int, seen: int) -> None:
        super().__init__(window)
        self.cumulative_length = seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Size and offset of masks: for the tokens that it holds."""
        held = 0 if self.keys is None else self.keys.shape[2]
        return held + query_length, self.cumulative_length - held


def _hold(layer: KeepLayer, slots: Slots | None, keys: Tensor, values: Tensor) -> None:
    """The layer holds these slots, and these tokens before those of its tail."""
    layer.slots = slots
    layer.keys = torch.cat([keys.to(layer.keys), layer.keys], 2)
    layer.values = torch.cat([values.to(layer.values), layer.values], 2)
    layer.watch = None


def without(slots: Slots, spans: Sequence[Span]) -> Slots:
    """Without those whose keys come from the tokens of some spans. Cut and joined as they are stored."""
    stay = torch.ones_like(slots.positions, dtype=torch.bool)
    for first, last in spans:
        stay &= (slots.positions < first) | (slots.positions >= last)
    heads = [_runs(slots, stay, lo, hi) for lo, hi in pairwise(slots.offsets)]
    return Slots.cat(heads)


def _runs(slots: Slots, stay: Tensor, lo: int, hi: int) -> Slots:
    """One head's slots that stay, run by run."""
    changes = (stay[lo + 1 : hi] != stay[lo : hi - 1]).nonzero()[:, 0].tolist() if hi > lo else []
    bounds = [lo, *(lo + 1 + change for change in changes), hi]
    runs = [slots.between(first, last) for first, last in pairwise(bounds) if first < last and bool(stay[first])]
    together = Slots.cat(runs or [slots.between(lo, lo)])
    return Slots(together.keys, together.values, together.bias, together.positions, (0, together.offsets[-1]))


def _gathered(layer: KeepLayer, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """One layer's exact keys and values of some spans."""
    parts = list(layer.backing.parts) if layer.backing else []
    start = 0 if layer.slots is None else layer.seen - layer.tail
    if sum(keys.shape[2] for keys, _ in parts) != start:
        raise KeepKVError(
            "no exact keys and values are held of this text: keep a fork of the cache from before its compression, or take "
            'backing="cpu"'
        )
    parts.append((layer.keys, layer.values))
    pieces, at = [], 0
    for keys, values in parts:
        size = keys.shape[2]
        for first, last in spans:
            lo, hi = max(first - at, 0), min(last - at, size)
            if lo < hi:
                pieces.append((keys[:, :, lo:hi].to(layer.keys), values[:, :, lo:hi].to(layer.values)))
        at += size
    gathered_keys, gathered_values = zip(*pieces, strict=True)
    return torch.cat(gathered_keys, 2), torch.cat(gathered_values, 2)
