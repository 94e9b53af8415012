"""CacheBlend, arXiv 2405.16444: some tokens of a joined text are read again, with the earlier texts in view.

A text that was read alone has keys and values that know nothing of the texts that now stand before it. All its tokens pass
the first layers again (`fresh`). Those whose keys and values change most there (high KV deviation, section 4.2) pass all
layers, and their new keys and values replace the old ones. A token sees what stands before it by its true position.
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
from keepkv.ops.softmax import PLAIN, Softmax
from keepkv.slots.slots import Slots

BlendVariant = Literal["repository", "paper"]
CHECK_LAYER = 1  # where deviations are looked at: the first layer whose keys and values depend on other tokens


class ReusedText(NamedTuple):
    """A text that is to be repaired.

    Attributes:
        ids: Token ids [1, n].
        exact: exact(i) is its exact keys and values [1, H, n, d] in layer i, moved to where it stands now.
    """

    ids: Tensor
    exact: Callable[[int], tuple[Tensor, Tensor]]


class Recomputed(NamedTuple):
    """What reading tokens of a text again has given, per layer.

    Attributes:
        tokens: Indices of what was read again, ascending, int64 [m].
        keys, values: Fresh keys and values [1, H, m, d].
        taken: Which of them replace the old ones, bool [m].
        queries: The tokens' queries [1, HG, m, d].
        scale: Of the queries.
        softmax: Each layer's cap and sinks; empty where the queries are.
    """

    tokens: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    taken: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    scale: float
    softmax: tuple[Softmax, ...] = ()


@torch.no_grad()
def recompute(
    model: PreTrainedModel,
    before: KeepCache,
    text: ReusedText,
    share: float,
    variant: BlendVariant = "repository",
    chosen: Tensor | None = None,
    layer_type: type[RecomputedLayer] | None = None,
) -> Recomputed:
    """Reads ceil(share × n) tokens of a text again, behind a cache.

    Args:
        model: The model.
        before: What stands before the text; it is not changed.
        text: The text.
        share: Of its tokens, between 0 and 1. A share of 1 is a full prefill.
        variant: Which tokens. "repository", as in the paper's code: those whose values deviate most in layer CHECK_LAYER, one
            set for all later layers. "paper": by keys and values, half as many again at first, and narrowed from layer to
            layer down to half of the share. Tokens that are dropped on the way are still computed: no time is saved by that.
        chosen: These tokens instead, ascending, int64 [m].
        layer_type: What stands in for a layer meanwhile.
    """
    count = text.ids.shape[1]
    if chosen is None:
        most = math.ceil(count * min(1.0, 1.5 * share if variant == "paper" else share))
        if most >= count:
            chosen = torch.arange(count, device=text.ids.device)
        else:
            change = deviation(fresh(model, before, text.ids), text.exact(CHECK_LAYER), variant == "paper")
            chosen = change.topk(most).indices.sort().values
    if not len(chosen):
        return _nothing_recomputed(before, chosen)
    most_of_layer: list[int] | list[None] = [None] * len(before.layers)
    if variant == "paper" and share < 1:
        most_of_layer = _narrowing(len(chosen), count, share, len(before.layers))
    new_layer = layer_type or RecomputedLayer
    layers = [
        new_layer(layer, text.exact(index), chosen, most)
        for index, (layer, most) in enumerate(zip(before.layers, most_of_layer, strict=True))
    ]
    for previous, layer in pairwise(layers):
        layer.previous = previous
    twin = before.fork()
    twin.layers = list(layers)
    positions = (before.get_seq_length() + chosen)[None]
    model(text.ids[:, chosen], position_ids=positions, past_key_values=twin, logits_to_keep=1)
    keys, values, taken = zip(*(layer.recomputed for layer in layers), strict=True)
    queries, softmax = zip(*((layer.query, layer.softmax) for layer in layers), strict=True)
    return Recomputed(chosen, keys, values, taken, queries, layers[0].scale, softmax)


@torch.no_grad()
def fresh(model: PreTrainedModel, before: KeepCache, ids: Tensor, layer: int = CHECK_LAYER) -> tuple[Tensor, Tensor]:
    """Keys and values [1, H, n, d] that a layer makes of ids [1, n] behind a cache. The layers after it do not run."""
    twin = before.fork()
    twin.layers[layer] = _StoppingLayer(before.layers[layer])
    try:
        model(ids, past_key_values=twin, logits_to_keep=1)
    except _EnoughError as enough:
        return enough.keys, enough.values
    raise AssertionError("the layer was not reached")


def deviation(new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor], with_keys: bool = False) -> Tensor:
    """How much each token's values, and with_keys also its keys, changed: float32 [n], section 4.2.

    new, old: keys and values [1, H, n, d]. The change is the norm of the difference over heads and dimensions.
    """
    change = ((new[1].float() - old[1].float()) ** 2).sum((0, 1, 3))
    if with_keys:
        change = ((new[0].float() - old[0].float()) ** 2).sum((0, 1, 3)) + change
    return change.sqrt()


class _EnoughError(Exception):
    """Ends a forward pass where no more is wanted of it."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


class _StoppingLayer(KeepLayer):
    """Stands in for a layer whose new keys and values are wanted, and nothing after them."""

    def __init__(self, layer: KeepLayer) -> None:
        super().__init__()
        vars(self).update(vars(layer))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise _EnoughError(key_states, value_states)


class RecomputedLayer(KeepLayer):
    """A layer that holds all of a text already and gets some of its tokens anew; they see only what stands before them.

    Args:
        layer: The layer of what stands before the text.
        exact: The text's keys and values [1, H, n, d].
        tokens: Which tokens come anew, int64 [m].
        most: How many of them may replace the old ones; None: all.
    """

    def __init__(self, layer: KeepLayer, exact: tuple[Tensor, Tensor], tokens: Tensor, most: int | None) -> None:
        super().__init__()
        vars(self).update(vars(layer))
        self.is_initialized = True
        self.slots = layer.slots or no_slots(layer)
        self.old = exact
        self.tokens = tokens
        self.most = most
        self.previous: RecomputedLayer | None = None
        self.taken = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        self._before = layer.tail
        self.seen = layer.seen + exact[0].shape[2]

    def get_seq_length(self) -> int:
        return self.seen - len(self.tokens)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen, 0  # the mask made of it is not used

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.recomputed: tuple[Tensor, Tensor, Tensor] = key_states, value_states, self._take(key_states, value_states)
        which = self.tokens[self.taken]
        keys, values = (x.clone() for x in self.old)
        keys[:, :, which] = key_states[:, :, self.taken]
        values[:, :, which] = value_states[:, :, self.taken]
        self.keys = torch.cat([self.keys, keys], 2)
        self.values = torch.cat([self.values, values], 2)
        return self.keys, self.values

    def _take(self, keys: Tensor, values: Tensor) -> Tensor:
        """Which tokens replace the old ones in this layer: of those in the layer before, the `most` that change most."""
        if self.previous is not None:
            self.taken = self.previous.taken
        if self.most is not None and self.most < int(self.taken.sum()):
            old_keys, old_values = self.old
            old = old_keys[:, :, self.tokens], old_values[:, :, self.tokens]
            change = deviation((keys, values), old, with_keys=True)
            best = change.masked_fill(~self.taken, -1).topk(self.most).indices
            self.taken = torch.zeros_like(self.taken).index_fill(0, best, True)
        return self.taken

    def sees(self, device: torch.device) -> Tensor:
        """Which columns of the tail each token sees, bool [1, 1, m, columns]: those up to itself."""
        columns = torch.arange(self.tail, device=device)
        return (columns <= self._before + self.tokens[:, None])[None, None]

    def attend(self, query: Tensor, mask: Tensor | None, scale: float, new: int, softmax: Softmax = PLAIN) -> Tensor:
        sees = self.sees(query.device)
        self.query = query
        self.scale = scale
        self.softmax = softmax
        assert self.slots is not None
        if len(self.slots.bias) or not softmax.plain:
            return super().attend(query, sees, scale, new, softmax)
        return scaled_dot_product_attention(query, self.keys, self.values, sees, scale=scale, enable_gqa=True)


def _narrowing(first: int, count: int, share: float, layers: int) -> list[int]:
    """How many tokens replace the old ones in each layer: `first` at first, evenly down to half of the share in the last."""
    last = math.ceil(count * share / 2)
    return [round(first + (last - first) * i / max(1, layers - 1)) for i in range(layers)]


def _nothing_recomputed(before: KeepCache, chosen: Tensor) -> Recomputed:
    empty = tuple(layer.keys[:, :, :0] for layer in before.layers)
    return Recomputed(chosen, empty, empty, (chosen.bool(),) * len(empty), (), 1.0)


def no_slots(layer: KeepLayer) -> Slots:
    """No slots, for a layer that was not compressed."""
    heads = layer.heads
    none = torch.zeros(0, device=layer.keys.device)
    return Slots(layer.keys[0, 0, :0], layer.values[0, 0, :0], none, none.int(), (0,) * (heads + 1))
