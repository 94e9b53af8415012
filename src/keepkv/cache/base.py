"""BaseCache: what transformers asks of a cache, over layers whose slots are ragged and whose newest tokens are exact.

It works with the stock attention modules of a model that runs `sdpa` attention: `update` hands them proxies for keys and
values, and PyTorch calls `_attention` below when they ask for scaled dot product attention (see sdpa_proxy.py). When something
is compressed is the subclass's to say.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from keepkv.cache.backing import Backing
from keepkv.cache.layer import KeepLayer
from keepkv.cache.observations import Observations
from keepkv.cache.policy import Policy
from keepkv.cache.report import Report
from keepkv.cache.sdpa_proxy import SdpaProxy
from keepkv.errors import KeepKVError
from keepkv.models import families
from keepkv.observe.repetition import Piece
from keepkv.observe.watch import Watch
from keepkv.recipe import Recipe
from keepkv.types import Observation

if TYPE_CHECKING:
    from typing_extensions import Self


class BaseCache(Cache):
    """The state of every layer, and attention over it; what is known of the rows of a batch.

    recipe: the settings that hold for the cache's life; policy: what its next compression goes by.
    """

    layers: list[Any]  # KeepLayer, or transformers' sliding-window layers

    def __init__(self, model: PreTrainedModel, recipe: Recipe, policy: Policy, column_mass: bool, auto: bool) -> None:
        families.check(model)
        super().__init__(layers=[KeepLayer() if kind is None else kind for kind in families.layer_kinds(model)])
        self.recipe, self.policy, self.column_mass, self.auto = recipe, policy, column_mass, auto
        for layer in self.keep_layers:
            layer.backing = Backing(recipe.backing) if recipe.backing else None
        self._rotary, self._projections = families.rotary(model), families.projections(model)
        self._last = max(i for i, layer in enumerate(self.layers) if isinstance(layer, KeepLayer))
        self._report: Report | None = None
        self._piece: Piece | None = None  # the part of the text that is being repeated
        self._expected: tuple[int, ...] = ()  # tokens that every row will have when its prompt has been read
        self._repeat_seconds = 0.0

    @abstractmethod
    def _after_forward(self, new: int) -> None:
        """Called when the last layer has attended to the `new` newest tokens."""

    @property
    def keep_layers(self) -> list[KeepLayer]:
        """The layers with full attention: those that are compressed."""
        return [layer for layer in self.layers if isinstance(layer, KeepLayer)]

    @property
    def live(self) -> bool:
        """Whether what comes later is folded into the compact part too."""
        return self.period is not None

    @property
    def period(self) -> int | None:
        """Tokens after which the newer ones are folded: the recipe's, or else its chunk."""
        return self.recipe.period if self.recipe.period is not None else self.chunk

    @property
    def chunk(self) -> int | None:
        """Tokens of a forward pass, at most; None: any number."""
        return self.recipe.chunk or None

    @property
    def compressed(self) -> bool:
        """Whether the decision has been taken: compressed, or left whole (the report says why)."""
        return self._report is not None

    @property
    def inv_freq(self) -> Tensor:
        """Rotary frequencies of the layers with full attention, float32 [r/2], as they are now."""
        return families.frequencies(self._rotary)

    @property
    def local_inv_freq(self) -> Tensor:
        """Rotary frequencies of the layers with a sliding window, float32 [r/2]."""
        return families.local_frequencies(self._rotary)

    def observations(self, row: int = 0, exact: bool = False) -> Sequence[Observation]:
        """What every layer has shown of one batch row, made when it is looked at; exact: of all its tokens as they were."""
        tail = self._tails()[row]
        return Observations(self.keep_layers, row, self.inv_freq, self._projections, self.policy.spans, tail, exact)

    def restore(self, report: Report | None) -> None:
        """Takes over what another cache, or a file, says of a compression; None: nothing has been decided yet."""
        self._report, self._repeat_seconds = report, report.repeat_seconds if report else 0.0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values; for a layer with full attention returns proxies that lead to `_attention`."""
        layer = self.layers[layer_idx]
        if self.chunk is not None and key_states.shape[2] > self.chunk and self._piece is None:
            raise KeepKVError(
                f"a forward pass of {key_states.shape[2]:,} tokens, more than chunk={self.chunk:,}: read the prompt with "
                f"cache.read(model, input_ids), or call generate(..., prefill_chunk_size={self.chunk})"
            )
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        if not isinstance(layer, KeepLayer):
            families.let_go(layer)
            return keys, values
        attend = partial(self._attention, layer_idx, key_states.shape[2])
        return SdpaProxy.of(key_states, layer.seen, attend), SdpaProxy.of(value_states, layer.seen, attend)

    def _attention(
        self, layer_idx: int, new: int, query: Tensor, key: Tensor, value: Tensor,
        attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Scaled dot product attention of the `new` newest tokens over a layer's state, in place of PyTorch's."""
        layer: KeepLayer = self.layers[layer_idx]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if self._piece is not None:
            return layer.repeat(query, scale, self._piece, self._piece.drafts[self.keep_layers.index(layer)])
        if layer.slots is not None:
            if dropout_p:
                raise KeepKVError("a compressed cache is for inference: call model.eval(), which turns attention dropout off")
            output = layer.attend(query, attn_mask, scale, new)
        else:
            keys, values = layer.keys, layer.values
            if key.shape[1] > keys.shape[1]:  # transformers repeats the KV heads where there is a mask
                keys, values = (x.repeat_interleave(key.shape[1] // x.shape[1], 1) for x in (keys, values))
            output = scaled_dot_product_attention(
                query, keys, values, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if self.live or not self.compressed:
            recipe = self.recipe
            before = layer.watch or Watch(layer_idx, recipe.references, recipe.seed, self.column_mass, scale, self.live)
            grouped = query.detach().reshape(len(query), layer.heads, -1, new, query.shape[-1])
            layer.watch = before.see(grouped, layer.state, attn_mask)
            if self.auto and layer_idx == self._last:
                self._after_forward(new)
        return output

    def fork(self) -> Self:
        """A second cache that goes on from here on its own. Nothing is copied: stored tensors are never written to."""
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        return twin

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest -tokens_to_remove tokens, exactly. Raises KeepKVError, and changes nothing, if it cannot."""
        copy.copy(self.keep_layers[0]).crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        if rows := len(self.starts):
            self.reorder_cache(torch.arange(rows)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.starts)).repeat_interleave(repeats))

    def _take(self, rows: Sequence[int]) -> None:
        """What is known of the rows follows them."""
        self.policy = self.policy.rows(rows)
        self._expected = tuple(self._expected[row] for row in rows) if self._expected else ()
        self._report = self._report and self._report.rows(rows)

    def _bank(self) -> None:
        """Queries that wait in the layers' watches are moved into their banks."""
        for layer in self.keep_layers:
            layer.watch = layer.watch and layer.watch.banked(layer.state)

    @property
    def heads(self) -> int:
        """KV heads of all layers that are compressed."""
        return sum(layer.heads for layer in self.keep_layers)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first real column of every row: behind its padding."""
        layer = self.keep_layers[0]
        if layer.watch:
            return layer.watch.starts
        return (0,) * (len(layer.keys) if layer.is_initialized else 0)

    def _tokens(self) -> tuple[int, ...]:
        """Tokens read per row, without padding; as they were when the cache was compressed, if it is not live."""
        if self._report is not None and not self.live:
            return self._report.tokens
        return tuple(self.keep_layers[0].seen - start for start in self.starts)

    def _tails(self) -> tuple[int, ...]:
        """Tokens of every row that are left out of compressions."""
        state = self.keep_layers[0].state
        return tuple(min(self.recipe.tail, state.seen - state.first(start)) for start in self.starts)

    def _entries(self, row: int) -> int:
        """Slots and tail tokens that one row holds, over all layers and heads, without what is left out."""
        start, tail = self.starts[row], self._tails()[row]
        return sum(layer.entries(row, start, tail) for layer in self.keep_layers)
