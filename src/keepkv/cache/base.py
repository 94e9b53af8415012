"""BaseCache: the half of `KeepCache` that faces transformers: update, attention, fork, crop, and the rows of a batch.

The way of one layer in a forward pass:

1. The model's attention module calls `update` with new keys and values. They are appended to the layer's tail, and the module
   gets two proxies (sdpa_proxy.py) in their place.
2. The module asks PyTorch for scaled dot product attention over the proxies, and PyTorch calls `_attention` here, with the
   queries. It attends to slots and tail together, and lets the layer's watch see the queries.
3. After the last layer it calls `_after_forward`, where the subclass, `KeepCache`, decides whether to compress.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from keepkv.cache.backing import Backing
from keepkv.cache.guard import all_or_nothing, check_whole
from keepkv.cache.index import Index
from keepkv.cache.layer import KeepLayer
from keepkv.cache.observations import Observations
from keepkv.cache.policy import Policy
from keepkv.cache.report import Report
from keepkv.cache.sdpa_proxy import SdpaProxy
from keepkv.errors import KeepKVError
from keepkv.models import families, identity
from keepkv.models.rotation import Rotaries
from keepkv.observe.repetition import Piece
from keepkv.observe.watch import Watch
from keepkv.ops.rope import Rotation
from keepkv.recipe import Recipe
from keepkv.types import Observation

if TYPE_CHECKING:
    from typing_extensions import Self


class BaseCache(Cache):
    """The state of every layer and attention over it.

    Attributes:
        recipe: The settings that the cache was made with.
        policy: What its next compression goes by: budget, method, storage, tokens to keep.
        column_mass: Whether all attention is summed while reading.
        auto: Whether it compresses by itself.
        rotaries: How the layers rotate keys and queries.
        index: Keys of the tokens that were compressed, to look them up by; None unless that is wanted. Set it before reading.
    """

    guarded = True  # whether passes are refused whose keys cannot be those of the next tokens
    layers: list[Any]  # KeepLayer, or transformers' sliding-window layers
    rotaries: Rotaries

    def __init__(self, model: PreTrainedModel, recipe: Recipe, policy: Policy, column_mass: bool, auto: bool) -> None:
        families.check_supported(model)
        super().__init__(layers=[KeepLayer() if kind is None else kind for kind in families.layer_kinds(model)])
        self.recipe = recipe
        self.policy = policy
        self.column_mass = column_mass
        self.auto = auto
        self.index: Index | None = None
        for layer in self.keep_layers:
            layer.backing = Backing(recipe.backing) if recipe.backing else None
        self._projections = families.projections(model)
        self._last = max(i for i, layer in enumerate(self.layers) if isinstance(layer, KeepLayer))
        self._report: Report | None = None  # what the last compression made, or why there was none
        self._piece: Piece | None = None  # the part of the text that is being repeated
        self._expected: tuple[int, ...] = ()  # tokens that every row will have when its prompt has been read
        self._starts: tuple[int, ...] = ()  # the first real column of every row, once nothing is observed any more
        self._repeat_seconds = 0.0
        self._model = weakref.ref(model)
        self._fingerprint = identity.fingerprint(model)
        self._key_shape = families.key_shape(model)
        self._recording = False  # whether a pass comes next that assisted generation may begin with
        self._first_pass = 0  # tokens of the pass before, if it was the first

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises KeepKVError for another model than the one that the cache was made for."""
        if self._model() is not model and identity.fingerprint(model) != self._fingerprint:
            raise KeepKVError("this cache was made for another model: make one for each, with KeepCache(model)")

    def _check_pass(self, key_states: Tensor, layer_idx: int) -> None:
        """Raises KeepKVError for keys that cannot be those of the next tokens."""
        if layer_idx >= len(self.layers) or (key_states.shape[1], key_states.shape[3]) != self._key_shape:
            heads, size = self._key_shape
            raise KeepKVError(
                f"keys {list(key_states.shape)} in layer {layer_idx}, expected [B, {heads}, n, {size}] in {len(self.layers)} "
                "layers: this cache was made for another model, make one with KeepCache(model)"
            )
        if layer_idx:
            return
        check_whole(self.layers)
        seen, new = self.layers[0].get_seq_length(), key_states.shape[2]
        if new > 1 and (seen, new) == (self._first_pass, self._first_pass) and self.auto and not self.live:
            warnings.warn(
                f"a second pass of {new:,} tokens: the first was compressed as if it were the whole prompt, and this one stays "
                "exact. A prompt in several passes (prefill_chunk_size) needs KeepCache(..., chunk=n), or cache.read()",
                stacklevel=2,
            )
        self._first_pass = new if not seen else 0
        recording, self._recording = self._recording, False
        if recording and key_states.shape[2] > seen > 0:
            raise KeepKVError(
                f"assisted generation and prompt lookup read the whole prompt again, on top of the {seen:,} tokens that this "
                "cache holds: give them a cache that has read nothing, or generate without them"
            )

    @abstractmethod
    def _after_forward(self, new: int) -> None:
        """Called when the last layer has attended to the `new` newest tokens."""

    @property
    def keep_layers(self) -> list[KeepLayer]:
        """The layers with full attention: those that are compressed. The others have a sliding window."""
        return [layer for layer in self.layers if isinstance(layer, KeepLayer)]

    @property
    def live(self) -> bool:
        """Whether what is read and written later is folded into the compact part too."""
        return self.period is not None

    @property
    def period(self) -> int | None:
        """Tokens after which the newer ones are folded: the recipe's period, or else its chunk; None: never."""
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
    def rotations(self) -> list[Rotation]:
        """How every layer rotates keys and queries now, those with a sliding window included."""
        return self.rotaries.at(max(self._tokens(), default=0))

    @property
    def keep_rotations(self) -> list[Rotation]:
        """The same of the layers that are compressed."""
        pairs = zip(self.layers, self.rotations, strict=True)
        return [rotation for layer, rotation in pairs if isinstance(layer, KeepLayer)]

    def observations(self, row: int = 0, exact: bool = False) -> Sequence[Observation]:
        """What every layer has shown of one batch row, each made when it is looked at.

        Args:
            row: The batch row.
            exact: Whether to look at all its tokens as they were, from the backing, instead of slots and tail.
        """
        tail = self._tails()[row]
        return Observations(self.keep_layers, row, self.keep_rotations, self._projections, self.policy.spans, tail, exact)

    def restore(self, report: Report | None) -> None:
        """Takes over what another cache, or a file, reports of a compression. None: nothing has been decided yet."""
        self._report = report
        self._repeat_seconds = report.repeat_seconds if report else 0.0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values [B, H, n, d]; for a layer with full attention returns proxies that lead to `_attention`."""
        if self.guarded and self._piece is None:
            self._check_pass(key_states, layer_idx)
        layer = self.layers[layer_idx]
        if self.chunk is not None and key_states.shape[2] > self.chunk and self._piece is None:
            raise KeepKVError(
                f"a forward pass of {key_states.shape[2]:,} tokens, more than chunk={self.chunk:,}: read the prompt with "
                f"cache.read(model, input_ids), or call generate(..., prefill_chunk_size={self.chunk})"
            )
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        if not isinstance(layer, KeepLayer):
            families.free_passed(layer)
            return keys, values
        attend = partial(self._attention, layer_idx, key_states.shape[2])
        return SdpaProxy.of(key_states, layer.seen, attend), SdpaProxy.of(value_states, layer.seen, attend)

    def _attention(
        self,
        layer_idx: int,
        new: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Scaled dot product attention of the `new` newest tokens over a layer's state, in place of PyTorch's.

        The arguments from `query` on are those of PyTorch's function; `key` and `value` are proxies. From here the layer's
        watch sees the queries, and after the last layer the cache may compress.
        """
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
            group = key.shape[1] // keys.shape[1]
            if group > 1:  # transformers repeats the KV heads where there is a mask
                keys = keys.repeat_interleave(group, 1)
                values = values.repeat_interleave(group, 1)
            output = scaled_dot_product_attention(
                query, keys, values, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if self.live or not self.compressed:
            recipe = self.recipe
            watch = layer.watch or Watch(layer_idx, recipe.references, recipe.seed, self.column_mass, scale, self.live)
            grouped = query.detach().reshape(len(query), layer.heads, -1, new, query.shape[-1])
            layer.watch = watch.see(grouped, layer.state, attn_mask)
            if self.auto and layer_idx == self._last:
                self._after_forward(new)
        return output

    def fork(self) -> Self:
        """A second cache that goes on from here on its own. It takes no memory: tensors are shared, and never changed."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin.layers = [copy.copy(layer) for layer in self.layers]
        return twin

    def __copy__(self) -> Self:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """As `fork`: what is stored is never changed, and the model's weights, which it looks at, need no copy."""
        return self.fork()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise KeepKVError(
            "a KeepCache cannot be pickled, because it belongs to a model in memory: compile_text() and save() write a text's "
            "cache into a file, and fork() copies a cache"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest tokens, exactly.

        Args:
            tokens_to_remove: Minus their number; a positive number is how many tokens stay, as older transformers ask for it.

        Raises:
            KeepKVError: if some of them are compressed already. Nothing has changed then.
        """
        check_whole(self.layers)
        copy.copy(self.keep_layers[0]).crop(tokens_to_remove)  # what is compressed is said first
        try:
            with all_or_nothing(self):
                super().crop(tokens_to_remove)
        except (RuntimeError, ValueError) as error:  # of transformers' layers
            raise KeepKVError(
                f"crop({tokens_to_remove}): a sliding window that has moved on cannot go back: fork() the cache before you "
                "read what you may want to take back"
            ) from error

    def activate_past_recording(self) -> None:
        """Called by transformers before it reads what it may take back; `_check_pass` refuses the whole prompt again."""
        super().activate_past_recording()  # type: ignore[no-untyped-call]
        self._recording = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the given batch rows, in that order, as beam search asks for."""
        with all_or_nothing(self):
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]
            self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given batch rows."""
        if rows := len(self.starts):
            self.reorder_cache(torch.arange(rows)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes every batch row several, one beside the other."""
        self.reorder_cache(torch.arange(len(self.starts)).repeat_interleave(repeats))

    def _take(self, rows: Sequence[int]) -> None:
        """Budgets, lengths and reports follow their rows."""
        self.policy = self.policy.rows(rows)
        self._expected = tuple(self._expected[row] for row in rows) if self._expected else ()
        self._starts = tuple(self._starts[row] for row in rows) if self._starts else ()
        self._report = self._report and self._report.rows(rows)

    def _bank(self) -> None:
        """Moves the queries that wait in the layers' watches into their banks."""
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
        return self._starts or (0,) * (len(layer.keys) if layer.is_initialized else 0)

    def _tokens(self) -> tuple[int, ...]:
        """Tokens read per row, without padding."""
        return tuple(self.keep_layers[0].seen - start for start in self.starts)

    def _tails(self) -> tuple[int, ...]:
        """Tokens of every row that are left out of compressions."""
        state = self.keep_layers[0].state
        return tuple(min(self.recipe.tail, state.seen - state.first(start)) for start in self.starts)

    def _entries(self, row: int) -> int:
        """Slots and tail tokens that one row holds, over all layers and heads, without what is left out."""
        start = self.starts[row]
        tail = self._tails()[row]
        return sum(layer.entries(row, start, tail) for layer in self.keep_layers)
