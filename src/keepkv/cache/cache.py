"""KeepCache: a transformers cache that becomes physically smaller as tokens are read and written.

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
from transformers.cache_utils import Cache

from keepkv import methods
from keepkv.budget import Budget
from keepkv.cache.backing import Backing, History
from keepkv.cache.layer import KeepLayer
from keepkv.cache.observations import Observations, check_observed
from keepkv.cache.policy import Limits
from keepkv.cache.prefill import read, rehearse
from keepkv.cache.report import Head, Report, weighed
from keepkv.cache.sdpa_proxy import StandIn
from keepkv.compress import Compressed, Progress, compress, in_row
from keepkv.errors import BudgetError, InputError, KeepKVError
from keepkv.methods import Method
from keepkv.models import families
from keepkv.observe.repetition import Piece
from keepkv.observe.watch import Watch
from keepkv.slots.quantized import FLOAT, Format, format_of
from keepkv.slots.slots import Slots
from keepkv.types import Observation


class KeepCache(Cache):
    """A cache of `budget` slots: `model.generate(**inputs, past_key_values=KeepCache(model, budget=0.1))`.

    The first forward pass of more than one token is the prompt. When it has been read, it is compressed by `method`;
    later tokens stay exact. With `auto=False` nothing happens until `compress()` is called, so that one reading can be
    compressed in several ways (`fork`), or before a question is asked.

    period: the cache is live: whenever so many tokens have come since, they are folded into the compact part, which is then
    compressed again to its budget, so that memory does not grow with what is written. chunk: the same while reading; no
    forward pass may have more tokens (`read` cuts a prompt, `generate` with prefill_chunk_size), and period is chunk if
    not given. A live cache holds at most budget + tail + period (or chunk) tokens, and queries (below).

    budget: a fraction (0.1, "10%") of the tokens read so far, slots per KV head on average (512), or bytes for all rows
    ("64MB"); or a list, one for each row of the batch. tail: the newest tokens, on top of the budget, that are left out of
    every compression, so that `crop` can forget them (assisted generation needs that).
    references: how many of each layer's queries are remembered at most until the next compression, whatever the length; a
    live cache keeps half of them beyond it, all in bfloat16. Fewer take less memory and time, and fit worse.
    backing: "cpu" or "disk" keeps the exact keys and values of all tokens there; `refresh()` then rebuilds the compact part
    from them, by itself every `refresh` tokens if given, so that the error of many folds does not add up.
    column_mass: also sum all attention while reading, for methods that need it (default: if `method` does).
    slots: how the compact part is stored, as it is ("float") or quantised ("int8", "int4"): more slots for the same bytes. All
    that is compressed is then rounded, also where the budget holds every token; newer tokens and the method "full" are exact.
    Raises ModelError for a model that cannot be compressed, BudgetError, MethodError, InputError for what cannot be read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        budget: Limits | Sequence[Limits] = 0.1,
        method: str | Method = "keepkv",
        *,
        period: int | None = None,
        chunk: int | None = None,
        tail: int = 0,
        backing: Backing | None = None,
        refresh: int | None = None,
        seed: int = 0,
        references: int = 2048,
        column_mass: bool | None = None,
        slots: str = "float",
        auto: bool = True,
    ) -> None:
        families.check(model)
        self.budgets, self.method, self.form = Budget.parse_all(budget), methods.get(method), format_of(slots)
        self.chunk, self.period, self.keep_tail = chunk, chunk if period is None else period, tail
        self.refresh_every = refresh
        for name, size in (("period", self.period), ("chunk", chunk), ("tail", tail + 1), ("refresh", refresh)):
            if size is not None and size < 1:
                raise InputError(f"{name}: expected a positive number of tokens")
        if backing not in (None, "cpu", "disk"):
            raise InputError(f"backing {backing!r}: expected 'cpu', 'disk' or None")
        if (refresh is not None and backing is None) or (backing is not None and self.period is None):
            raise InputError("refresh needs a backing, and a backing a live cache: give a period, or a chunk, and a backing")
        self.seed, self.references, self.auto = seed, references, auto
        self.column_mass = self.method.column_mass if column_mass is None else column_mass
        super().__init__(layers=[KeepLayer() if kind is None else kind for kind in families.layer_kinds(model)])
        for layer in self.keep_layers:
            layer.history = History(backing) if backing else None
        self._rotary, self._projections = families.rotary(model), families.projections(model)
        self._last = max(i for i, layer in enumerate(self.layers) if isinstance(layer, KeepLayer))
        self._report: Report | None = None
        self._piece: Piece | None = None
        self._expected: tuple[int, ...] = ()  # tokens that every row will have when its prompt has been read
        self._ahead = 0  # tokens that `read` has still to read of a prompt that it has repeated
        self._keep: tuple[tuple[int, int], ...] = ()
        self._refreshed = 0  # columns at the last refresh
        self._repeat_seconds = 0.0

    layers: list[Any]  # KeepLayer, or transformers' sliding-window layers

    @property
    def keep_layers(self) -> list[KeepLayer]:
        """The layers with full attention: those that are compressed."""
        return [layer for layer in self.layers if isinstance(layer, KeepLayer)]

    @property
    def live(self) -> bool:
        """Whether what comes later is folded into the compact part too."""
        return self.period is not None

    @property
    def _due(self) -> bool:
        """Whether enough tokens have come since the last compression for the next one."""
        return self.period is not None and self.keep_layers[0].tail >= self.period + self.keep_tail

    @property
    def compressed(self) -> bool:
        """Whether the decision has been taken: compressed, or left whole (the report says why)."""
        return self._report is not None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values; for a layer with full attention returns stand-ins that lead to `_attention`."""
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
            return layer.rehearse(query, scale, self._piece, self._piece.drafts[self.keep_layers.index(layer)])
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
            before = layer.watch or Watch(layer_idx, self.references, self.seed, self.column_mass, scale, self.live)
            grouped = query.detach().reshape(len(query), layer.heads, -1, new, query.shape[-1])
            layer.watch = before.see(grouped, layer.held, attn_mask)
            if self.auto and layer_idx == self._last:
                self._after_forward(new)
        return output

    def _after_forward(self, new: int) -> None:
        """Compresses the prompt when it has been read, and what came later when it is due."""
        first = not self.compressed and new > 1 and not self._expected
        if first and not self.live:
            try:
                self.compress()
            except BudgetError as error:  # a prompt of a few tokens: nobody's generation should fail for that
                warnings.warn(f"the prompt stays whole: {error}", stacklevel=2)
                self._settle([], note=f"left whole: {error}")
        elif first or self._due:
            if self.refresh_every is not None and self.get_seq_length() - self._refreshed >= self.refresh_every:
                self.refresh()
            else:
                self.compress()

    @torch.no_grad()
    def compress(
        self,
        budget: Limits | Sequence[Limits] | None = None,
        method: str | Method | None = None,
        progress: Progress = lambda done, of: None,
        keep: Sequence[tuple[int, int]] = (),
        slots: str | None = None,
    ) -> KeepCache:
        """Compresses everything held, but for the newest `tail` tokens, in place, and returns the cache itself.

        A budget of all the tokens changes nothing at all, unless slots are quantised. A live cache can be compressed again and
        again: slots and newer tokens together make the new slots, votes and fitted values are merged further. progress(done,
        of) is told of every step. keep: spans of tokens, (first, last + 1), that keep their slots in every head, also later on,
        untouched unless the method merges keys or slots are quantised; for one row. slots: the format from now on, if given.
        Raises BudgetError for a budget below what must be kept (a live cache waits instead); KeepKVError if nothing was read,
        if the cache is compressed already and not live, or if the method needs what was not observed.
        """
        before = self.budgets, self.method, self.form, self._keep
        self.budgets = self.budgets if budget is None else Budget.parse_all(budget)
        self.method = self.method if method is None else methods.get(method)
        self.form = self.form if slots is None else format_of(slots)
        self._keep = (*self._keep, *keep)
        try:
            return self._compress(progress)
        except KeepKVError:
            self.budgets, self.method, self.form, self._keep = before
            raise

    @torch.no_grad()
    def refresh(self, progress: Progress = lambda done, of: None) -> KeepCache:
        """Rebuilds the compact part from the exact keys and values of all tokens, with the queries seen until now.

        The periodic lossless compression of KeepKV (arXiv 2504.09936v2): what earlier folds lost is back. One layer's keys
        and values are on the device at a time. Raises KeepKVError without a backing, or for a method that sums attention.
        """
        if any(layer.history is None for layer in self.keep_layers):
            raise KeepKVError('nothing to refresh from: KeepCache(..., backing="cpu") or "disk" keeps exact keys and values')
        if self.method.column_mass:
            raise KeepKVError(f"{self.method.name} sums attention: what dropped tokens would have got is not known")
        self._compress(progress, exact=True)
        self._refreshed = self.get_seq_length()
        return self

    def _compress(self, progress: Progress, exact: bool = False) -> KeepCache:
        start = time.perf_counter()
        self._check_watched()
        tokens, tails = self._tokens(), self._tails()
        try:
            totals = [self._total_slots(row, count) for row, count in enumerate(tokens)]
        except BudgetError:
            if not self.live:
                raise
            return self  # too few tokens as yet
        held = [(count - tails[row]) * self._heads if exact else self._entries(row) for row, count in enumerate(tokens)]
        if not exact and not self._form.bits and all(total >= entries for total, entries in zip(totals, held, strict=True)):
            if not self.live:
                self._settle([], note="left whole: the budget holds every token")
            return self

        self._bank()
        method, done = self.method.in_the_middle if self._ahead else self.method, []
        for row, total in enumerate(totals):
            slots = min(total, held[row]) + tails[row] * self._heads
            tell = partial(in_row, progress, row, len(totals))
            done.append(compress(self._observations(row, exact), method, slots, tell, self._form))
        self._settle(done, time.perf_counter() - start, exact=exact)
        return self

    def _check_watched(self) -> None:
        if (self.compressed and not self.live) or any(layer.watch is None for layer in self.keep_layers):
            state = "is compressed already" if self.compressed else "has read nothing yet"
            raise KeepKVError(
                f"this cache {state}: read a prompt into a new KeepCache, and fork() it before compressing; "
                "KeepCache(..., period=n) can be compressed again"
            )
        check_observed(self.method, self.keep_layers, self.form)
        rows = len(self._tokens())
        if self._keep and rows > 1:
            raise KeepKVError("keep names tokens of one text: this cache has read a batch")
        if len(self.budgets) not in (1, rows):
            raise KeepKVError(f"{len(self.budgets)} budgets for {rows} rows: give one for each, or one for all")

    read = read
    rehearse = rehearse

    def _bank(self) -> None:
        for layer in self.keep_layers:
            layer.watch = layer.watch and layer.watch.banked(layer.held)

    def _observations(self, row: int, exact: bool = False) -> Sequence[Observation]:
        """What every layer has shown of one batch row; exact: of all its tokens as they were."""
        inv_freq, tail = families.frequencies(self._rotary), self._tails()[row]
        return Observations(self.keep_layers, row, inv_freq, self._projections, self._keep, tail, exact)

    def _settle(self, rows: Sequence[Compressed], seconds: float = 0.0, note: str = "", exact: bool = False) -> None:
        """Takes over what `compress` made of the rows (nothing: the prompt stays whole); unless live, stops observing."""
        last, tails = self._report, self._tails()
        self._report = Report(
            method=self.method.name,
            budget=self._limits,
            tokens=self._tokens(),
            heads=tuple(
                tuple(tuple(Head.of(head, tail) for head in layer) for layer in row.merged)
                for row, tail in zip(rows, tails, strict=False)
            ),
            compress_seconds=seconds + (last.compress_seconds if last else 0),
            longest_pause=max(seconds, last.longest_pause if last else 0),
            compressions=(last.compressions if last else 0) + bool(rows),
            note=note,
            form=(self._form if rows else FLOAT).name,
        )
        for index, layer in enumerate(self.keep_layers):
            if rows:
                parts = [row.slots[index].newest_off(tail) for row, tail in zip(rows, tails, strict=True)]
                watch = layer.watch if layer.watch is None or not exact else replace(layer.watch, recall=layer.exact_recall())
                watch = watch and watch.compacted([row.plan.kept[index] for row in rows], layer.held)
                layer.compact(Slots.cat(parts), min(self.keep_tail, layer.tail))
                layer.watch = watch
            if not self.live:
                layer.watch = None

    def report(self) -> Report:
        """What was kept, the votes, and the bytes held at this moment."""
        if not self.keep_layers[0].is_initialized:
            return Report(self.method.name, self._limits, (), note="nothing has been read yet")
        known = self._report or Report(self.method.name, self._limits, self._tokens(), note="not compressed yet")
        sliding = [x for layer in self.layers if not isinstance(layer, KeepLayer) for x in (layer.keys, layer.values)]
        return weighed(replace(known, repeat_seconds=self._repeat_seconds), self.keep_layers, sliding)

    def fork(self) -> KeepCache:
        """A second cache that goes on from here on its own. Nothing is copied: stored tensors are never written to."""
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        return twin

    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        self._report, self._expected, self._keep, self._refreshed, self._repeat_seconds = None, (), (), 0, 0.0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest -tokens_to_remove tokens, exactly. Raises KeepKVError, and changes nothing, if it cannot."""
        copy.copy(self.keep_layers[0]).crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        if rows := len(self._starts()):
            self.reorder_cache(torch.arange(rows)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self._starts())).repeat_interleave(repeats))

    def _take(self, rows: Sequence[int]) -> None:
        """What is known of the rows follows them."""
        if len(self.budgets) > 1:
            self.budgets = tuple(self.budgets[row] for row in rows)
        self._expected = tuple(self._expected[row] for row in rows) if self._expected else ()
        self._report = self._report and self._report.rows(rows)

    @property
    def _limits(self) -> str:
        return ", ".join(map(str, self.budgets))

    @property
    def _form(self) -> Format:
        return FLOAT if self.method.keeps_all else self.form

    @property
    def _heads(self) -> int:
        return sum(layer.heads for layer in self.keep_layers)

    def _starts(self) -> tuple[int, ...]:
        """The first real column of every row."""
        layer = self.keep_layers[0]
        if layer.watch:
            return layer.watch.starts
        return (0,) * (len(layer.keys) if layer.is_initialized else 0)

    def _tokens(self) -> tuple[int, ...]:
        """Tokens read per row, without padding; as they were when the cache was compressed, if it is not live."""
        if self._report is not None and not self.live:
            return self._report.tokens
        return tuple(self.keep_layers[0].seen - start for start in self._starts())

    def _tails(self) -> tuple[int, ...]:
        """Tokens of every row that are left out of compressions."""
        held = self.keep_layers[0].held
        return tuple(min(self.keep_tail, held.seen - held.first(start)) for start in self._starts())

    def _entries(self, row: int) -> int:
        """Slots and tail tokens that one row holds, over all layers and heads."""
        start, tail = self._starts()[row], self._tails()[row]
        return sum(layer.entries(row, start, tail) for layer in self.keep_layers)

    def _total_slots(self, row: int, tokens: int) -> int:
        """The budget of one row of `tokens` tokens, in slots over all layers and heads."""
        tokens = max(tokens, self._expected[row] if self._expected else 0)
        if self.method.keeps_all:
            return tokens * self._heads
        layer = self.keep_layers[0]
        budget = self.budgets[row if len(self.budgets) > 1 else 0]
        shared = budget.kind == "bytes" and len(self.budgets) == 1  # bytes are for the whole cache, rows share them
        return budget.total_slots(tokens, self._heads, layer.slot_bytes(self._form) * (len(layer.keys) if shared else 1))
