"""KeepCache: a transformers cache that becomes physically smaller once the prompt has been read.

It works with the stock attention modules of a model that runs `sdpa` attention: `update` hands them stand-ins for keys
and values, and PyTorch calls `_attention` below when they ask for scaled dot product attention (see standin.py).
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from keepkv import hosts, methods
from keepkv.attention import attend_slots, attend_tail, join
from keepkv.budget import Budget
from keepkv.compress import Compressed, Progress, compress
from keepkv.errors import BudgetError, KeepKVError
from keepkv.methods import Method
from keepkv.observe import Watch
from keepkv.recall import Piece, attend_piece
from keepkv.report import Head, Report, held_bytes
from keepkv.standin import StandIn
from keepkv.types import Observation, Slots

OVERLAP = 8  # tokens of the previous chunk that a repetition starts from
DRAFT = 16  # a repetition sees one in so many tokens of what it does not repeat, and at least two chunks


class KeepLayer(CacheLayerMixin):
    """One layer's state: `slots`, the compact part (None until compressed), and the dense tail `keys`, `values`.

    keys [B, H, n, d] and values [B, H, n, d_v] hold the newest n tokens exactly. `seen` counts all columns read, padding
    included: it alone decides positions and masks. `watch` is what was observed, until the prompt is compressed.
    """

    is_sliding = False
    is_croppable = True
    keys: Tensor  # None until the first token is read, as in transformers' own layers
    values: Tensor

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots: Slots | None = None
        self.seen = 0
        self.watch: Watch | None = None

    @property
    def tail(self) -> int:
        return self.keys.shape[2] if self.is_initialized else 0

    @property
    def heads(self) -> int:
        return self.keys.shape[1] if self.is_initialized else 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: key, value, vote and position."""
        return sum(x.shape[3] * x.element_size() for x in (self.keys, self.values)) + 8

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.seen += key_states.shape[2]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0  # masks are made for tokens, as if nothing had been compressed

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.21

    def compact(self, slots: Slots) -> None:
        """The whole tail becomes the compact part; the dense tensors are released."""
        self.slots = slots
        self.keys, self.values = self.keys[:, :, :0].clone(), self.values[:, :, :0].clone()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest -tokens_to_remove tokens, exactly. They must not have been compressed."""
        if not -self.tail <= tokens_to_remove <= 0:
            raise KeepKVError(
                f"crop({tokens_to_remove}): tokens that are compressed cannot be forgotten one by one: "
                f"expected a number from -{self.tail} to 0"
            )
        if tokens_to_remove:
            self.keys, self.values = self.keys[:, :, :tokens_to_remove], self.values[:, :, :tokens_to_remove]
            self.seen += tokens_to_remove

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            rows = beam_idx.to(self.keys.device)
            heads = self.heads
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            self.slots = self.slots and self.slots.rows(rows.tolist(), heads)
            self.watch = self.watch and self.watch.rows(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(len(self.keys))[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(len(self.keys)).repeat_interleave(repeats))

    def rehearse(self, query: Tensor, scale: float, draft: Slots, first: int, last: int) -> Tensor:
        """Attention of a repetition, query [1, H*G, new, d], of tokens first..last; what it asks for is noted."""
        assert self.watch is not None
        new, wide = query.shape[2], torch.promote_types(query.dtype, torch.float32)
        rows = query[0].reshape(self.heads, -1, query.shape[-1]).to(wide) * scale  # [H, G*new, d]
        output, peak = attend_piece(rows, self.keys[0].to(wide), self.values[0].to(wide), new, draft, first, last)
        self.watch = self.watch.rehearse(peak.float())
        return output.to(query.dtype).reshape(query.shape[:-1] + output.shape[-1:])

    def attend(self, query: Tensor, mask: Tensor | None, scale: float, new: int) -> Tensor:
        """Attention of the `new` newest tokens, query [B, H*G, new, d], over compact part and tail together."""
        assert self.slots is not None
        rows = query.reshape(len(query), self.heads, -1, query.shape[-1])  # [B, H, G*new, d]
        if mask is None and new > 1:
            mask = torch.ones(new, self.tail, dtype=torch.bool, device=query.device).tril(self.tail - new)[None, None]
        if mask is not None:
            mask = mask[..., mask.shape[-1] - self.tail :].repeat(1, 1, rows.shape[2] // new, 1)
        compact = attend_slots(rows, self.slots, scale)
        output, _ = join(compact, attend_tail(rows, self.keys, self.values, mask, scale))
        return output.to(query.dtype).reshape(*query.shape[:-1], -1)


class KeepCache(Cache):
    """A cache of `budget` slots: `model.generate(**inputs, past_key_values=KeepCache(model, budget=0.1))`.

    The first forward pass of more than one token is the prompt. When it has been read, it is compressed by `method`;
    later tokens stay exact. With `auto=False` nothing happens until `compress()` is called, so that one reading can be
    compressed in several ways (`fork`), or before a question is asked.

    budget: a fraction (0.1, "10%"), slots per KV head on average (512, "512"), or bytes for all rows ("64MB").
    references: how many of each layer's queries are remembered at most while reading, whatever the length.
    column_mass: also sum all attention while reading, for methods that need it (default: if `method` does).
    Raises ModelError for a model that cannot be compressed, BudgetError and MethodError for what cannot be read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        budget: str | float | Budget = 0.1,
        method: str | Method = "keepkv",
        *,
        seed: int = 0,
        references: int = 2048,
        column_mass: bool | None = None,
        auto: bool = True,
    ) -> None:
        hosts.check(model)
        self.budget, self.method = Budget.parse(budget), methods.get(method)
        self.seed, self.references, self.auto = seed, references, auto
        self.column_mass = self.method.column_mass if column_mass is None else column_mass
        super().__init__(layers=[KeepLayer() if kind is None else kind for kind in hosts.layer_kinds(model)])
        self._rotary = hosts.rotary(model)
        self._last = max(i for i, layer in enumerate(self.layers) if isinstance(layer, KeepLayer))
        self._report: Report | None = None
        self._piece: Piece | None = None

    layers: list[Any]  # KeepLayer, or transformers' sliding-window layers

    @property
    def keep_layers(self) -> list[KeepLayer]:
        """The layers with full attention: those that are compressed."""
        return [layer for layer in self.layers if isinstance(layer, KeepLayer)]

    @property
    def compressed(self) -> bool:
        """Whether the decision has been taken: compressed, or left whole (the report says why)."""
        return self._report is not None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values; for a layer with full attention returns stand-ins that lead to `_attention`."""
        layer = self.layers[layer_idx]
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        if not isinstance(layer, KeepLayer):
            return keys, values
        attend = partial(self._attention, layer_idx, key_states.shape[2])
        return StandIn.of(key_states, layer.seen, attend), StandIn.of(value_states, layer.seen, attend)

    def _attention(
        self, layer_idx: int, new: int, query: Tensor, key: Tensor, value: Tensor,
        attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Scaled dot product attention of the `new` newest tokens over a layer's state, in place of PyTorch's."""
        layer: KeepLayer = self.layers[layer_idx]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if self._piece is not None:
            first, last, drafts = self._piece
            return layer.rehearse(query, scale, drafts[self.keep_layers.index(layer)], first, last)
        if layer.slots is not None:
            if dropout_p:
                raise KeepKVError("a compressed cache is for inference: call model.eval(), which turns attention dropout off")
            return layer.attend(query, attn_mask, scale, new)
        keys, values = layer.keys, layer.values
        if key.shape[1] > keys.shape[1]:  # transformers repeats the KV heads where there is a mask
            keys, values = (x.repeat_interleave(key.shape[1] // x.shape[1], 1) for x in (keys, values))
        output = scaled_dot_product_attention(
            query, keys, values, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        if not self.compressed:
            before = layer.watch or Watch(layer_idx, self.references, self.seed, self.column_mass, scale)
            grouped = query.detach().reshape(len(query), layer.heads, -1, new, query.shape[-1])
            layer.watch = before.see(grouped, layer.keys.detach(), attn_mask)
            if self.auto and new > 1 and layer_idx == self._last:
                self._compress_if_possible()
        return output

    def _compress_if_possible(self) -> None:
        try:
            self.compress()
        except BudgetError as error:  # a prompt of a few tokens: nobody's generation should fail for that
            warnings.warn(f"the prompt stays whole: {error}", stacklevel=2)
            self._settle([], note=f"left whole: {error}")

    @torch.no_grad()
    def compress(
        self,
        budget: str | float | Budget | None = None,
        method: str | Method | None = None,
        progress: Progress = lambda done, of: None,
        keep: Sequence[tuple[int, int]] = (),
    ) -> KeepCache:
        """Compresses everything read so far, in place, and returns the cache itself.

        A budget of all the tokens changes nothing at all. progress(done, of) is told of every step. keep: spans of tokens,
        (first, last + 1), that keep their slots in every head, untouched unless the method merges keys; for one row.
        Raises BudgetError for a budget below what must be kept; KeepKVError if nothing was read, if the cache is
        compressed already, or if the method needs what was not observed.
        """
        self.budget = self.budget if budget is None else Budget.parse(budget)
        self.method = self.method if method is None else methods.get(method)
        if self.compressed or any(layer.watch is None for layer in self.keep_layers):
            state = "is compressed already" if self.compressed else "has read nothing yet"
            raise KeepKVError(f"this cache {state}: read a prompt into a new KeepCache, and fork() it before compressing")
        if self.method.column_mass and not self.column_mass:
            raise KeepKVError(
                f"{self.method.name} must see all attention while the prompt is read: KeepCache(..., column_mass=True)"
            )
        start = time.perf_counter()
        tokens = self._tokens()
        if keep and len(tokens) > 1:
            raise KeepKVError("keep names tokens of one text: this cache has read a batch")
        totals = [self._total_slots(count) for count in tokens]
        if totals == [count * self._heads for count in tokens]:
            self._settle([], note="left whole: the budget holds every token")
            return self

        done = []
        for row, total in enumerate(totals):
            seen = self._observations(row, keep)
            done.append(compress(seen, self.method, total, partial(_in_row, progress, row, len(totals))))
        self._settle(done, seconds=time.perf_counter() - start)
        return self

    @torch.no_grad()
    def rehearse(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        lead: Tensor | None = None,
        chunk: int = 256,
        progress: Progress = lambda done, of: None,
    ) -> KeepCache:
        """Repeats the text that was read over its own cache and observes what that asks for; then `compress`.

        What a model needs to repeat a text word for word is what it needs to answer about its details. input_ids [1, T]:
        what was read; lead [1, n]: an instruction to repeat it, in the model's chat format. Each piece of `chunk` tokens
        sees itself exactly and the rest of the text as in a draft, an eviction to 1/16: about one more reading, linear in T.
        After KVzip, arXiv 2505.23416. Raises KeepKVError for a batch, and for another text than the one that was read.
        """
        tokens = self.keep_layers[0].seen
        if self.compressed or tuple(input_ids.shape) != (1, tokens) or self._tokens() != (tokens,):
            raise KeepKVError(
                f"rehearse() repeats the text that was just read, before compression, one row: expected [1, {tokens}] "
                f"token ids, got {list(input_ids.shape)}"
            )
        lead = input_ids[:, :0] if lead is None else lead.to(input_ids.device)
        size = min(tokens, max(tokens // DRAFT, 2 * chunk))
        drafts = compress(self._observations(0), methods.get("snapkv"), size * self._heads).slots
        for lo in range(0, tokens, chunk):
            first, last = max(0, lo - OVERLAP), min(lo + chunk, tokens)
            fed = torch.cat([lead, input_ids[:, first:last]], dim=1)
            twin = self.fork()
            twin._piece = Piece(first, last, drafts)
            model(fed, past_key_values=twin, logits_to_keep=1)
            for ours, theirs in zip(self.keep_layers, twin.keep_layers, strict=True):
                ours.watch = theirs.watch
            progress(last, tokens)
        return self

    def _observations(self, row: int, keep: Sequence[tuple[int, int]] = ()) -> list[Observation]:
        """What every layer has shown of one batch row, and the tokens of it that must stay."""
        inv_freq = hosts.frequencies(self._rotary)
        seen = [
            layer.watch.observation(row, layer.keys, layer.values, inv_freq)
            for layer in self.keep_layers
            if layer.watch is not None
        ]
        if not keep:
            return seen
        stay = torch.zeros(seen[0].tokens, dtype=torch.bool, device=seen[0].keys.device)
        for first, last in keep:
            stay[first:last] = True
        return [replace(observation, keep=stay.to(observation.keys.device)) for observation in seen]

    def _settle(self, rows: Sequence[Compressed], seconds: float = 0.0, note: str = "") -> None:
        """Takes over what `compress` made of the rows (nothing: the prompt stays whole) and stops observing."""
        self._report = Report(
            method=self.method.name,
            budget=str(self.budget),
            tokens=self._tokens(),
            heads=tuple(tuple(tuple(map(Head.of, layer)) for layer in row.merged) for row in rows),
            compress_seconds=seconds,
            note=note,
        )
        for layer, parts in zip(self.keep_layers, zip(*(row.slots for row in rows), strict=True), strict=False):
            layer.compact(Slots.cat(parts))
        for layer in self.keep_layers:
            layer.watch = None

    def report(self) -> Report:
        """What was kept, the votes, and the bytes held at this moment."""
        layers = self.keep_layers
        if not layers[0].is_initialized:
            return Report(self.method.name, str(self.budget), (), note="nothing has been read yet")
        known = self._report or Report(self.method.name, str(self.budget), self._tokens(), note="not compressed yet")
        sliding = [x for layer in self.layers if not isinstance(layer, KeepLayer) for x in (layer.keys, layer.values)]
        ours = [x for layer in layers for x in (layer.keys, layer.values, *(layer.slots.tensors if layer.slots else ()))]
        width = sum((layer.slot_bytes - 8) * layer.heads for layer in layers) * len(layers[0].keys)
        return replace(
            known,
            tail=layers[0].tail,
            kv_bytes=held_bytes([*ours, *sliding]),
            kv_bytes_full=layers[0].seen * width + held_bytes(sliding),
        )

    def fork(self) -> KeepCache:
        """A second cache that goes on from here on its own. Nothing is copied: stored tensors are never written to."""
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        return twin

    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        self._report = None

    @property
    def _heads(self) -> int:
        return sum(layer.heads for layer in self.keep_layers)

    def _tokens(self) -> tuple[int, ...]:
        """Tokens read per row, without padding."""
        layer = self.keep_layers[0]
        if self._report is not None:
            return self._report.tokens
        return tuple(layer.seen - start for start in layer.watch.starts) if layer.watch else (layer.seen,)

    def _total_slots(self, tokens: int) -> int:
        """The budget of one row of `tokens` tokens, in slots over all layers and heads."""
        if self.method.keeps_all:
            return tokens * self._heads
        layer = self.keep_layers[0]
        rows = len(layer.keys) if self.budget.kind == "bytes" else 1  # bytes are for the whole cache, rows share them
        return self.budget.total_slots(tokens, self._heads, layer.slot_bytes * rows)


def _in_row(progress: Progress, row: int, rows: int, done: int, of: int) -> None:
    progress(row * of + done, rows * of)
