"""Blend: tokens of a joined text read again with the earlier texts in view. CacheBlend, arXiv 2405.16444.

A text that was read alone has keys and values that know nothing of the texts now before it. All its tokens pass the first
layers again (`fresh`); those whose keys and values change most there (high KV deviation) pass all layers, and theirs replace
the old ones. A token sees what stands before it by its true position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from keepkv.cache import KeepCache
from keepkv.cache.layer import KeepLayer
from keepkv.slots.slots import Slots

Variant = Literal["repository", "paper"]
CHECK = 1  # the layer where deviations are looked at: the first one whose keys and values depend on other tokens


class Text(NamedTuple):
    """What is read again: ids [1, n], and exact keys and values [1, H, n, d] of every layer, moved to their new places."""

    ids: Tensor
    exact: Callable[[int], tuple[Tensor, Tensor]]


class Renewed(NamedTuple):
    """tokens int64 [m], ascending indices of what was read again; per layer the fresh keys and values [1, H, m, d], which of
    them replace the old ones, bool [m], and the queries [1, HG, m, d] as they were asked, with their scale."""

    tokens: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    taken: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    scale: float


@torch.no_grad()
def renew(
    model: PreTrainedModel, before: KeepCache, text: Text, share: float, variant: Variant = "repository",
    chosen: Tensor | None = None, layer_type: type[Again] | None = None,
) -> Renewed:  # fmt: skip
    """Reads ceil(share n) tokens of a text again, behind the cache `before`, which is not changed.

    variant "repository": those whose values deviate most in layer CHECK, one set for all later layers; "paper": by keys and
    values, half as many again at first, and narrowed from layer to layer to half of the share (those that are dropped on the
    way are still computed: their time is not saved). chosen int64 [m]: these instead. A share of 1 is a full prefill.
    layer_type: what stands for a layer meanwhile.
    """
    count = text.ids.shape[1]
    if chosen is None:
        most = math.ceil(count * min(1.0, 1.5 * share if variant == "paper" else share))
        if most >= count:
            chosen = torch.arange(count, device=text.ids.device)
        else:
            change = deviation(fresh(model, before, text.ids), text.exact(CHECK), variant == "paper")
            chosen = change.topk(most).indices.sort().values
    if not len(chosen):
        return _nothing_new(before, chosen)
    narrow = _narrowed(len(chosen), count, share, len(before.layers)) if variant == "paper" and share < 1 else None
    twin, start = before.fork(), before.get_seq_length()
    kind = layer_type or Again
    rows = [kind(layer, text.exact(i), chosen, narrow[i] if narrow else None) for i, layer in enumerate(before.layers)]
    for above, below in pairwise(rows):
        below.above = above
    twin.layers = list(rows)
    positions = (start + chosen)[None]
    model(text.ids[:, chosen], position_ids=positions, past_key_values=twin, logits_to_keep=1)
    keys, values, taken = zip(*(row.renewed for row in rows), strict=True)
    return Renewed(chosen, keys, values, taken, tuple(row.asked for row in rows), rows[0].scale)


@torch.no_grad()
def fresh(model: PreTrainedModel, before: KeepCache, ids: Tensor, layer: int = CHECK) -> tuple[Tensor, Tensor]:
    """Keys and values [1, H, n, d] that a layer makes of ids [1, n] read behind a cache: the layers after it do not run."""
    twin = before.fork()
    twin.layers[layer] = _Stop(before.layers[layer])
    try:
        model(ids, past_key_values=twin, logits_to_keep=1)
    except _EnoughError as enough:
        return enough.keys, enough.values
    raise AssertionError("the layer was not asked")


def deviation(new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor], with_keys: bool = False) -> Tensor:
    """How much each token's values (and keys) changed, [n]: the norm over heads of the difference, float32. Section 4.2."""
    pairs = list(zip(new, old, strict=True))[0 if with_keys else 1 :]
    return sum(((a.float() - b.float()) ** 2).sum((0, 1, 3)) for a, b in pairs).sqrt()  # type: ignore[union-attr]


class _EnoughError(Exception):
    """Ends a forward pass where no more is wanted of it."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


class _Stop(KeepLayer):
    """Stands for a layer whose keys and values are wanted, and nothing after them."""

    def __init__(self, layer: KeepLayer) -> None:
        super().__init__()
        vars(self).update(vars(layer))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise _EnoughError(key_states, value_states)


class Again(KeepLayer):
    """A layer that holds all of a text already, and gets some of its tokens anew; they see only what stands before them."""

    def __init__(self, layer: KeepLayer, exact: tuple[Tensor, Tensor], tokens: Tensor, most: int | None) -> None:
        super().__init__()
        vars(self).update(vars(layer))
        self.is_initialized = True
        self.slots = layer.slots or nothing(layer)
        self.old, self.tokens, self.most = exact, tokens, most
        self.above: Again | None = None
        self.taken = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        self._before = layer.tail
        self.seen = layer.seen + exact[0].shape[2]

    def get_seq_length(self) -> int:
        return self.seen - len(self.tokens)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen, 0  # the mask made of it is not used

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.renewed: tuple[Tensor, Tensor, Tensor] = key_states, value_states, self._take(key_states, value_states)
        which = self.tokens[self.taken]
        keys, values = (x.clone() for x in self.old)
        keys[:, :, which], values[:, :, which] = key_states[:, :, self.taken], value_states[:, :, self.taken]
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        return self.keys, self.values

    def _take(self, keys: Tensor, values: Tensor) -> Tensor:
        """Which of the tokens are renewed in this layer: of those of the layer before, the `most` that change most."""
        if self.above is not None:
            self.taken = self.above.taken
        if self.most is not None and self.most < int(self.taken.sum()):
            change = deviation((keys, values), tuple(x[:, :, self.tokens] for x in self.old), with_keys=True)  # type: ignore
            best = change.masked_fill(~self.taken, -1).topk(self.most).indices
            self.taken = torch.zeros_like(self.taken).index_fill(0, best, True)
        return self.taken

    def sees(self, device: torch.device) -> Tensor:
        """Which columns of the tail each token sees, bool [1, 1, m, columns]: those up to itself."""
        columns = torch.arange(self.tail, device=device)
        return (columns <= self._before + self.tokens[:, None])[None, None]

    def attend(self, query: Tensor, mask: Tensor | None, scale: float, new: int) -> Tensor:
        sees = self.sees(query.device)
        self.asked, self.scale = query, scale
        assert self.slots is not None
        if len(self.slots.bias):
            return super().attend(query, sees, scale, new)
        return scaled_dot_product_attention(query, self.keys, self.values, sees, scale=scale, enable_gqa=True)


def _narrowed(first: int, count: int, share: float, layers: int) -> list[int]:
    """How many tokens are renewed in each layer: all at first, evenly down to half of the share in the last."""
    last = math.ceil(count * share / 2)
    return [round(first + (last - first) * i / max(1, layers - 1)) for i in range(layers)]


def _nothing_new(before: KeepCache, chosen: Tensor) -> Renewed:
    empty = tuple(layer.keys[:, :, :0] for layer in before.layers)
    return Renewed(chosen, empty, empty, (chosen.bool(),) * len(empty), (), 1.0)


def nothing(layer: KeepLayer) -> Slots:
    """No slots, for a layer that was not compressed."""
    heads = layer.heads
    none = torch.zeros(0, device=layer.keys.device)
    return Slots(layer.keys[0, 0, :0], layer.values[0, 0, :0], none, none.int(), (0,) * (heads + 1))
