"""BaseCache: the half of `KeepCache` that faces transformers: update, attention, fork, crop, and the rows of a batch.

The way of one layer in a forward pass:

1. The model's attention module calls `update` with new keys and values. They are appended to the layer's tail, and the module
   gets two proxies (proxies.py) in their place.
2. The module calls its attention function on the proxies, which leads to `_attention` here, with the queries. It attends to
   slots and tail together, and lets the layer's watch see the queries.
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
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from keepkv.cache import other_layers
from keepkv.cache.attention_function import lead_to_caches
from keepkv.cache.backing import Backing
from keepkv.cache.guard import all_or_nothing, check_whole, holds_keys
from keepkv.cache.index import Index
from keepkv.cache.layer import Asked, KeepLayer
from keepkv.cache.observations import Observations
from keepkv.cache.policy import Policy
from keepkv.cache.proxies import Call, Proxy, own_bias
from keepkv.cache.report import Report
from keepkv.cache.state_layer import keep_layer
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
    layers: list[Any]  # KeepLayer, or transformers' own layers for what is not compressed (other_layers.py)
    rotaries: Rotaries

    def __init__(self, model: PreTrainedModel, recipe: Recipe, policy: Policy, column_mass: bool, auto: bool) -> None:
        families.check_supported(model)
        lead_to_caches(model)
        kinds = families.layer_kinds(model)
        super().__init__(layers=[keep_layer(kind) if families.is_compressed(kind) else kind for kind in kinds])
        self.recipe = recipe
        self.policy = policy
        self.column_mass = column_mass
        self.auto = auto
        self.index: Index | None = None
        for layer in self.keep_layers:
            layer.backing = Backing(recipe.backing) if recipe.backing else None
        self._projections = families.projections(model)
        self._calls = 0  # of attention over compressed layers, in the forward pass that runs
        self._all_calls = sum(layer.users for layer in self.keep_layers)
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
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        shape = key_states.shape[1], key_states.shape[3]
        if layer is None or (isinstance(layer, KeepLayer) and shape != self._key_shape):  # windows may have sizes of their own
            heads, size = self._key_shape
            raise KeepKVError(
                f"keys {list(key_states.shape)} in layer {layer_idx}, expected [B, {heads}, n, {size}] in {len(self.layers)} "
                "layers: this cache was made for another model, make one with KeepCache(model)"
            )
        if layer is not next(filter(holds_keys, self.layers)):
            return
        check_whole(self.layers)
        seen, new = layer.get_seq_length(), key_states.shape[2]
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
        """The layers with full attention and keys of their own: those that are compressed."""
        return [layer for layer in self.layers if isinstance(layer, KeepLayer)]

    @property
    def is_linear(self) -> list[bool]:
        """Which layers hold a state and no keys, for transformers' masks."""
        return [other_layers.has_state(layer) and not hasattr(layer, "keys") for layer in self.layers]

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
        """How every layer rotates keys and queries now, also those that are not compressed."""
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
        self._check_chunk(key_states.shape[2])
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        if not isinstance(layer, KeepLayer):
            other_layers.free_passed(layer)
            return keys, values
        if layer is self._first:
            self._calls = 0
        attend = partial(self._attention, layer_idx, key_states.shape[2])
        return Proxy.of(key_states, layer.seen, attend), Proxy.of(value_states, layer.seen, attend)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Size and offset of a layer's attention masks. A forward pass that is too long ends here, before anything changes."""
        self._check_chunk(query_length)
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def _check_chunk(self, new: int) -> None:
        """Raises KeepKVError for a forward pass of more tokens than a chunk has."""
        if self.chunk is not None and new > self.chunk and self._piece is None:
            raise KeepKVError(
                f"a forward pass of {new:,} tokens, more than chunk={self.chunk:,}: read the prompt with "
                f"cache.read(model, input_ids), or call generate(..., prefill_chunk_size={self.chunk})"
            )

    def _attention(self, layer_idx: int, new: int, call: Call) -> Tensor:
        """Attention of the `new` newest tokens over a layer's state, in place of the function that the model called.

        From here the layer's watch sees the queries, and after the last layer the cache may compress.
        """
        layer: KeepLayer = self.layers[layer_idx]
        query = call.query
        asking = layer.asking(query, new)
        if call.mask is not None and call.mask.shape[1] > 1:
            raise own_bias()
        if self._piece is not None:
            return layer.repeat(call, self._piece, self._piece.drafts[self.keep_layers.index(layer)])
        if layer.slots is not None:
            if call.dropout:
                raise KeepKVError("a compressed cache is for inference: call model.eval(), which turns attention dropout off")
            output = layer.attend(query, call.mask, call.scale, asking, call.softmax)
        else:
            output = call.stock(layer.keys, layer.values)
        self._calls += 1
        if self.live or not self.compressed:
            if (asked := layer.ask(call, new)) is not None:
                watch = layer.watch or self._new_watch(layer_idx, asked)
                layer.watch = watch.see(asked.queries, layer.state, call.mask)
            if self.auto and self._calls == self._all_calls:
                self._after_forward(new)
        return output

    def _new_watch(self, layer_idx: int, asked: Asked) -> Watch:
        """What a layer has shown whose users ask so: nothing yet."""
        recipe = self.recipe
        with_mass, rounded = self.column_mass, self.live
        return Watch(layer_idx, recipe.references, recipe.seed, with_mass, asked.scale, rounded, softmax=asked.softmax)

    @property
    def _first(self) -> KeepLayer:
        """The first layer that is compressed."""
        return next(layer for layer in self.layers if isinstance(layer, KeepLayer))

    @property
    def last_logits(self) -> int | Tensor:
        """What to give a model as `logits_to_keep` for the last token's logits, so that all layers ask for all tokens.

        Where layers share keys, models run the later ones only for the tokens that a number asks logits for.
        """
        return 1 if self._all_calls == len(self.keep_layers) else torch.tensor([-1])

    def fork(self) -> Self:
        """A second cache that goes on from here on its own. It takes no memory: tensors are shared, and never changed.

        Only the states of linear attention, Mamba and convolutions are copied, since models write to them. Their size does not
        grow with the text.
        """
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin.layers = [other_layers.forked(layer) for layer in self.layers]
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
            KeepKVError: if some of them are compressed already, if a sliding window has moved on over some, or if a layer has a
                state that every token changes. Nothing has changed then.
        """
        check_whole(self.layers)
        copy.copy(self._first).crop(tokens_to_remove)  # raises before any layer has changed
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self._first.seen)
        recording = any(getattr(layer, "record_past", False) for layer in self.layers)
        if not tokens_to_remove and not recording:
            return
        for index, layer in enumerate(self.layers):
            other_layers.check_crop(index, layer, tokens_to_remove)
        with all_or_nothing(self):
            for layer in self.layers:
                layer.crop(tokens_to_remove)

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
