"""KeepCache: a cache for transformers that becomes physically smaller as tokens are read and written.

This module decides when something is compressed, and with which settings. How it is compressed is in `keepkv.compress`. The
base class, in base.py, is the half that faces transformers: through it, the cache gets keys, values and queries.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv import methods, render
from keepkv.budget import BudgetLike, is_single
from keepkv.cache import other_layers
from keepkv.cache.base import BaseCache
from keepkv.cache.guard import all_or_nothing, check_whole
from keepkv.cache.layer import KeepLayer
from keepkv.cache.observations import Observations, check_observed
from keepkv.cache.policy import Policy
from keepkv.cache.report import Head, Report, with_bytes_held
from keepkv.cache.self_check import checked, unchecked
from keepkv.compress import Compressed, Progress, Way, compress, compress_in_ways, in_row
from keepkv.errors import BudgetError, InputError, KeepKVError
from keepkv.methods import Method
from keepkv.observe.repetition import Piece, Repeat
from keepkv.recipe import BackingKind, Recipe
from keepkv.slots.slot_dtype import AUTO, AUTO_FORMATS, FLOAT
from keepkv.slots.slots import Slots

if TYPE_CHECKING:
    from typing_extensions import Self

OVERLAP = 8  # tokens of the previous chunk that a repetition starts from


class KeepCache(BaseCache):
    """A compressed KV cache, to be used in place of transformers' own.

    The first forward pass of more than one token is the prompt. When it has been read, it is compressed to `budget` slots by
    `method`. Later tokens stay exact. With `auto=False` nothing is compressed until `compress()` is called, so that one reading
    can be compressed in several ways (`fork`), or before a question is asked.

    With a `period` the cache is live: whenever so many tokens have come since the last compression, they are folded into the
    compact part, which is compressed again to its budget. So memory does not grow with what is written. With a `chunk` the same
    happens while reading: no forward pass may have more tokens (`read` cuts a prompt, and so does `generate` with
    prefill_chunk_size), and the period is the chunk if none is given. A live cache holds at most budget + tail + period (or
    chunk) tokens, and queries (`references`).

    Printing a cache shows what it holds; `report()` says more, and a notebook draws it.

    Args:
        model: Any supported transformers model with `sdpa` attention. It is not changed, and the cache does not hold it.
        budget: See `Recipe`. A share is that of a cache of the tokens read so far. A list has one budget for each row of the
            batch.
        method: See `Recipe`.
        slot_dtype: See `Recipe`. A format that rounds, if it is named, rounds everything that is compressed, also where the
            budget holds every token. With "auto" that stays exact. Newer tokens and the method "full" always do. All rows of a
            batch are stored in one format.
        full_dtype: See `Recipe`.
        period: Tokens after which a live cache folds the newer ones. None: the cache is not live, unless a chunk is given.
        chunk: Tokens of a forward pass, at most. None or 0: a prompt is read at once.
        tail: How many of the newest tokens are left out of every compression, on top of the budget, so that `crop` can forget
            them. Assisted generation needs that.
        backing: "cpu" or "disk" keeps the exact keys and values of all tokens there. `refresh()` then rebuilds the compact
            part from them.
        refresh: With a backing, the tokens after which that happens by itself, so that errors of many folds do not add up.
        references: How many of each layer's queries are remembered at most until the next compression, whatever the length of
            the text. A live cache keeps half of them beyond it, in bfloat16. Fewer take less memory and time, and fit worse.
        seed: Of everything that is drawn at random.
        column_mass: Whether all attention is summed while reading, for methods that need it. None: if `method` does.
        auto: Whether to compress when a prompt has been read and, if the cache is live, whenever it is due.
        check: Whether the first cache for a model's class and configuration tries the model first: a few passes of a few
            tokens (`keepkv.cache.self_check`). Without it, the model's layers are taken to rotate as its code suggests.

    Raises:
        ModelError: for a model that cannot be compressed.
        BudgetError, MethodError, InputError: for settings that cannot be read or do not go together.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).eval()
        >>> cache = KeepCache(model, budget=20)
        >>> output = model(torch.arange(80)[None], past_key_values=cache)  # or model.generate(..., past_key_values=cache)
        >>> cache
        KeepCache(method='keepkv', budget='20', tokens=80, slots_per_head=20.0, tail=0, bytes=3.7 kB, live=False)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        budget: BudgetLike | Sequence[BudgetLike] = Recipe.budget,
        method: str | Method = Recipe.method,
        *,
        slot_dtype: str = Recipe.slot_dtype,
        full_dtype: str = Recipe.full_dtype,
        period: int | None = Recipe.period,
        chunk: int | None = Recipe.chunk,
        tail: int = Recipe.tail,
        backing: BackingKind | None = Recipe.backing,
        refresh: int | None = Recipe.refresh,
        references: int = Recipe.references,
        seed: int = Recipe.seed,
        column_mass: bool | None = None,
        auto: bool = True,
        check: bool = True,
    ) -> None:
        recipe = Recipe(
            budget=budget if is_single(budget) else tuple(budget),
            method=methods.get(method),
            slot_dtype=slot_dtype,
            chunk=chunk,
            period=period,
            tail=tail,
            backing=backing,
            refresh=refresh,
            references=references,
            seed=seed,
            full_dtype=full_dtype,
        )
        policy = Policy.of(budget, method, slot_dtype, full_dtype)
        sizes = {"period": period, "chunk": chunk or None, "tail": tail + 1, "refresh": refresh, "references": references}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise InputError(f"{name}: expected a positive number of tokens")
        if (refresh is not None and backing is None) or (backing is not None and period is None and not chunk):
            raise InputError("refresh needs a backing, and a backing a live cache: give a period, or a chunk, and a backing")
        super().__init__(model, recipe, policy, policy.method.column_mass if column_mass is None else column_mass, auto)
        self.rotaries = checked(model, partial(KeepCache, model, check=False)) if check else unchecked(model)
        self._ahead = 0  # tokens that `read` has still to read of a prompt that it has repeated
        self._refreshed = 0  # columns at the last refresh

    @classmethod
    def of(cls, model: PreTrainedModel, recipe: Recipe, *, column_mass: bool | None = None, auto: bool = True) -> Self:
        """A cache with a recipe's settings. Those about texts (repeat, keep, tolerance, exact) are for whoever reads one."""
        return cls(
            model,
            recipe.budget,
            recipe.method,
            slot_dtype=recipe.slot_dtype,
            full_dtype=recipe.full_dtype,
            period=recipe.period,
            chunk=recipe.chunk,
            tail=recipe.tail,
            backing=recipe.backing,
            refresh=recipe.refresh,
            references=recipe.references,
            seed=recipe.seed,
            column_mass=column_mass,
            auto=auto,
        )

    @property
    def _due(self) -> bool:
        """Whether enough tokens have come since the last compression for the next one."""
        return self.period is not None and self.keep_layers[0].tail >= self.period + self.recipe.tail

    def _after_forward(self, new: int) -> None:
        """Compresses the prompt when it has been read and, if the cache is live, what came later when it is due."""
        first = not self.compressed and new > 1 and not self._expected
        if first and not self.live:
            try:
                self.compress()
            except BudgetError as error:  # a prompt of a few tokens: nobody's generation should fail for that
                warnings.warn(f"the prompt stays whole: {error}", stacklevel=2)
                self._settle(self.policy, [], note=f"left whole: {error}")
        elif first or self._due:
            self._fold()

    def _fold(self) -> None:
        """Compresses what came since the last time, or, where that is due, rebuilds all from the backing."""
        refresh = self.recipe.refresh
        if refresh is not None and self.get_seq_length() - self._refreshed >= refresh:
            self.refresh()
        else:
            self.compress()

    @torch.no_grad()
    def read(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        repeat: Tensor | None = None,
        keep: Sequence[tuple[int, int]] = (),
        progress: Progress = lambda done, of: None,
    ) -> Self:
        """Reads a prompt of any length, `chunk` tokens at a time, and compresses whenever it outgrows the budget.

        A budget that is a share is that of the whole prompt, so that its first chunks stay whole as long as there is room. The
        first chunk is the shortest one: so a row of a left-padded batch is cut as if it were alone. What is read after the
        prompt of a cache that is not live was compressed stays exact.

        Args:
            model: The model that the cache was made for.
            input_ids: int64 [B, T].
            attention_mask: [B, T] or [B, tokens read before + T]; rows may be padded on the left.
            repeat: An instruction [1, n] to repeat the text, in the model's chat format. Each chunk is then repeated (see
                `repeat`) before it is compressed, and compressed with the method's `midway` merge until all has been read.
                A method that needs a repetition gets one without it too.
            keep: As in `compress`.
            progress: Called with (tokens read, tokens in all).

        Returns:
            The cache itself.

        Raises:
            InputError: for an attention mask of another shape, and for no tokens at all.
            KeepKVError: for another model, and as `repeat` and `compress` do.

        Whatever goes wrong, or interrupts it: the cache is as before then.
        """
        self.check_model(model)
        with all_or_nothing(self):
            self._read(model, input_ids, attention_mask, repeat, keep, progress)
        return self

    def _read(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        repeat: Tensor | None,
        keep: Sequence[tuple[int, int]],
        progress: Progress,
    ) -> None:
        """As `read`."""
        batch, length = input_ids.shape
        size = self.chunk or max(1, length)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        before = self.get_seq_length()
        if mask.shape[1] not in (length, before + length):
            raise InputError(f"attention mask {list(mask.shape)}: expected [{batch}, {length}] or [{batch}, {before + length}]")
        tokens = self._tokens() if before else (0,) * batch
        self._expected = tuple(a + b for a, b in zip(tokens, mask[:, -length:].sum(1).tolist(), strict=True))
        if mask.shape[1] == length and before:
            starts = torch.tensor([before - count for count in tokens], device=mask.device)
            columns = torch.arange(before, device=mask.device).expand(batch, -1)
            mask = torch.cat([(columns >= starts[:, None]).to(mask.dtype), mask], 1)
        padded = not bool(mask.all())
        if padded and any(map(other_layers.has_state, self.layers)):
            _check_lone_padding(mask[:, -length:], size)
        exact = self.compressed and not self.live  # nothing will be compressed any more
        method = self.policy.method
        if repeat is None and method.repeat is not None and method.repeat.needed and not exact:
            repeat = input_ids[:, :0]
        if not before and not length:
            raise InputError("the prompt is empty: expected at least one token")
        auto = self.auto
        self.auto = False
        self.policy = self.policy.changed(spans=keep)
        try:
            lo = 0
            while lo < length:
                hi = lo + ((length - lo) % size or size)
                self._ahead = 0 if repeat is None else length - hi
                masks = {}
                if padded:
                    masks["attention_mask"] = mask[:, : before + hi]
                    masks["position_ids"] = _positions(mask, before + lo, before + hi)
                model(input_ids[:, lo:hi], past_key_values=self, logits_to_keep=self.last_logits, **masks)
                if repeat is not None:
                    self.repeat(model, input_ids[:, lo:hi], repeat)
                if self.live and (self._due or hi < length or lo or (auto and before == 0)):
                    self._fold()
                lo = hi
                progress(lo, length)
            if auto and not self.live and not exact:
                self.compress()
        finally:
            self.auto = auto
            self._ahead = 0
            self._first_pass = 0  # what comes now is no other piece of this prompt

    @torch.no_grad()
    def repeat(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        lead: Tensor | None = None,
        how: Repeat | None = None,
        progress: Progress = lambda done, of: None,
    ) -> Self:
        """Repeats the text that was just read over its own cache, and observes what the model attends to. Then `compress`.

        What a model needs to repeat a text word for word is what it needs to answer questions about its details (KVzip, arXiv
        2505.23416; docs/theory.md 4.4). By default each piece of 256 tokens sees itself exactly, and the rest of the text as in
        a draft, an eviction to 1/16. That costs about one more reading, and is linear in the text's length. In the middle of a
        prompt that is read in chunks, the repetition asks from the position where the prompt will end, as questions will.

        Args:
            model: The model that the cache was made for.
            input_ids: int64 [1, n], the newest n tokens, not compressed yet.
            lead: An instruction [1, m] to repeat them, in the model's chat format.
            how: How the text is repeated. None: as the method has it.
            progress: Called with (tokens repeated, tokens in all).

        Returns:
            The cache itself.

        Raises:
            KeepKVError: for a batch, for a text that is not the newest, and if the cache is compressed and not live.
        """
        self.check_model(model)
        tokens = self.keep_layers[0].seen
        tail = self.keep_layers[0].tail
        one_row = input_ids.dim() == 2 and len(input_ids) == 1 and self._tokens() == (tokens,)
        newest = one_row and 0 < input_ids.shape[1] <= tail and (self.live or input_ids.shape[1] == tail)
        if not newest or (self.compressed and not self.live):
            raise KeepKVError(
                f"repeat() repeats the text that was just read, before compression, one row: expected [1, {tail}] "
                f"token ids, got {list(input_ids.shape)}"
            )
        start = time.perf_counter()
        lead = input_ids[:, :0] if lead is None else lead.to(input_ids.device)
        self._bank()
        how = how or self.policy.method.repeat or Repeat()
        observations = Observations(self.keep_layers, 0, self.keep_rotations, self._projections)
        begin = tokens - input_ids.shape[1]
        end = tokens + self._ahead
        room = self._entries(0) + self._tails()[0] * self.heads
        size = max(room // self.heads // how.draft, 2 * how.chunk)  # slots per head of the draft: at least two pieces' worth
        drafts = compress(observations, methods.get("snapkv"), min(room, size * self.heads)).slots
        for lo in range(begin, tokens, how.chunk):
            first = max(begin, lo - OVERLAP)
            last = min(lo + how.chunk, tokens)
            piece = torch.cat([lead, input_ids[:, first - begin : last - begin]], dim=1)
            twin = self.fork()
            twin._piece = Piece(first, last, drafts, how)
            behind = _as_if_after(end, tokens, piece) if end > tokens else {}
            model(piece, past_key_values=twin, logits_to_keep=self.last_logits, **behind)
            for ours, theirs in zip(self.keep_layers, twin.keep_layers, strict=True):
                ours.watch = theirs.watch
            progress(last - begin, tokens - begin)
        self._repeat_seconds += time.perf_counter() - start
        return self

    @torch.no_grad()
    def compress(
        self,
        budget: BudgetLike | Sequence[BudgetLike] | None = None,
        method: str | Method | None = None,
        progress: Progress = lambda done, of: None,
        keep: Sequence[tuple[int, int]] = (),
        slot_dtype: str | None = None,
    ) -> Self:
        """Compresses everything held, but for the newest `tail` tokens, in place.

        A budget of all the tokens changes nothing, unless `slot_dtype` names a format that rounds. A live cache can be
        compressed again and again: slots and newer tokens together make the new slots, and their votes and fitted values are
        merged further. Settings that are given here hold from now on.

        Args:
            budget: As in the constructor.
            method: As in the constructor.
            progress: Called with (steps done, steps in all).
            keep: Spans of tokens, (first, last + 1), that keep a slot in every head, now and in later compressions. Their keys
                and values stay untouched unless the method merges keys or slots are quantized. Only for a single row.
            slot_dtype: As in the constructor.

        Returns:
            The cache itself.

        Raises:
            BudgetError: for a count or bytes below what must be kept (a live cache waits for more tokens instead). A share that
                is less for a text as short as this is raised to the least that must be kept, and the report says so.
            KeepKVError: if nothing was read, if the cache is compressed already and not live, or if the method needs what was
                not observed. The cache and its settings are then as before.
        """
        policy = self.policy.changed(budget, method, slot_dtype, keep)
        if budget is not None and self.live:  # what is too small for any text is not waited for
            for row, tokens in enumerate(self._tokens()):
                policy.total_slots(row, tokens, self.keep_layers)
        with all_or_nothing(self):
            self._compress(policy, progress)
        self.policy = policy
        return self

    @torch.no_grad()
    def refresh(self, progress: Progress = lambda done, of: None) -> Self:
        """Rebuilds the compact part from the exact keys and values of all tokens, with the queries seen until now.

        This is the periodic lossless compression of KeepKV (arXiv 2504.09936v2): what earlier folds lost is back. Only one
        layer's keys and values are on the device at a time.

        Args:
            progress: Called with (steps done, steps in all).

        Returns:
            The cache itself.

        Raises:
            KeepKVError: without a backing, and for a method that sums attention.
        """
        if any(layer.backing is None for layer in self.keep_layers):
            raise KeepKVError('nothing to refresh from: KeepCache(..., backing="cpu") or "disk" keeps exact keys and values')
        if self.policy.method.column_mass:
            raise KeepKVError(f"{self.policy.method.name} sums attention: what dropped tokens would have got is not known")
        with all_or_nothing(self):
            self._compress(self.policy, progress, exact=True)
        self._refreshed = self.get_seq_length()
        return self

    def _compress(self, policy: Policy, progress: Progress, exact: bool = False) -> None:
        """Compresses every row by the policy; exact: all its tokens as they were, from the backing. Raises KeepKVError."""
        start = time.perf_counter()
        if self.guarded:
            check_whole(self.keep_layers)  # behind the last of them, layers with sliding windows have still to read
        self._check(policy)
        tokens = self._tokens()
        expected = self._expected or (0,) * len(tokens)
        lengths = [max(counts) for counts in zip(tokens, expected, strict=True)]
        try:
            ways = self._ways(policy, lengths, exact)
        except BudgetError:
            if not self.live:
                raise
            return  # too few tokens as yet
        first, totals = ways[0]
        if self._are_held(totals, exact) and not exact and not first.stored_as.rounds:
            if not self.live:
                self._settle(first, [], note="left whole: the budget holds every token")
            return

        self._bank()
        tried = self._tried(ways, progress, exact)
        taken, rows = min(tried, key=lambda way: fmean(row.lost for row in way[1]))  # of equals the first
        self._settle(taken, rows, time.perf_counter() - start, taken.note(lengths, self.keep_layers), exact)

    def _ways(self, policy: Policy, lengths: Sequence[int], exact: bool) -> list[tuple[Policy, list[int]]]:
        """The policy and every row's slots; with slot_dtype "auto" in every format that may lose least. Raises BudgetError."""

        def way(policy: Policy) -> tuple[Policy, list[int]]:
            return policy, [policy.total_slots(row, length, self.keep_layers) for row, length in enumerate(lengths)]

        if policy.stored_as != AUTO:
            return [way(policy)]
        # Bits cost no slots where slots are counted, and folds of a live cache round keys again and again.
        several = policy.method.judged and not self.live and any(budget.kind != "count" for budget in policy.budgets)
        ways, errors = [], []
        for slot_dtype in (FLOAT, *(AUTO_FORMATS if several else AUTO_FORMATS[:1])):
            try:
                ways.append(way(replace(policy, slot_dtype=slot_dtype)))
            except BudgetError as error:  # the least that must be kept may fit in another format
                errors.append(error)
        if not ways:
            raise errors[-1]
        whole = [way for way in ways if way[0].stored_as == FLOAT and self._are_held(way[1], exact)]
        rounded = [way for way in ways if way[0].stored_as != FLOAT]
        within = [way for way in rounded if not way[0].note(lengths, self.keep_layers)]  # the share buys what must be kept
        return whole or within or rounded or ways

    def _tried(
        self, ways: Sequence[tuple[Policy, list[int]]], progress: Progress, exact: bool
    ) -> list[tuple[Policy, list[Compressed]]]:
        """The ways that have room for what must stay, and all rows of each. Raises BudgetError if none has."""
        try:
            return list(zip((policy for policy, _ in ways), self._rows(ways, progress, exact), strict=True))
        except BudgetError:
            if len(ways) == 1:
                raise
            return self._tried(ways[1:], progress, exact)  # fewer bits, more slots

    def _are_held(self, totals: Sequence[int], exact: bool) -> bool:
        """Whether every row's slots are enough for all its entries, see `_held`."""
        return all(total >= held for total, held in zip(totals, self._held(exact), strict=True))

    def _held(self, exact: bool) -> list[int]:
        """Entries of every row over all layers and heads, without the tail; exact: as if nothing had been compressed."""
        if not exact:
            return [self._entries(row) for row in range(len(self._tokens()))]
        return [(count - tail) * self.heads for count, tail in zip(self._tokens(), self._tails(), strict=True)]

    def _rows(self, ways: Sequence[tuple[Policy, list[int]]], progress: Progress, exact: bool) -> list[list[Compressed]]:
        """For every way, all rows, compressed to so many slots."""
        policy, totals = ways[0]
        method = policy.method.in_the_middle if self._ahead else policy.method
        rows = []
        for row, (held, tail) in enumerate(zip(self._held(exact), self._tails(), strict=True)):
            slots = [Way(way.stored_as, min(totals[row], held) + tail * self.heads) for way, totals in ways]
            observations = Observations(
                self.keep_layers, row, self.keep_rotations, self._projections, policy.spans, tail, exact
            )
            rows.append(compress_in_ways(observations, method, slots, partial(in_row, progress, row, len(totals))))
        return [list(way) for way in zip(*rows, strict=True)]

    def _check(self, policy: Policy) -> None:
        """Raises KeepKVError unless what is held can be compressed by the policy."""
        if (self.compressed and not self.live) or any(layer.watch is None for layer in self.keep_layers):
            state = "is compressed already" if self.compressed else "has read nothing yet"
            raise KeepKVError(
                f"this cache {state}: read a prompt into a new KeepCache, and fork() it before compressing; "
                "KeepCache(..., period=n) can be compressed again"
            )
        check_observed(policy.method, self.keep_layers, policy.stored_as)
        rows = len(self._tokens())
        if policy.spans and rows > 1:
            raise KeepKVError("keep names tokens of one text: this cache has read a batch")
        if len(policy.budgets) not in (1, rows):
            raise KeepKVError(f"{len(policy.budgets)} budgets for {rows} rows: give one for each, or one for all")

    def _settle(
        self, policy: Policy, rows: Sequence[Compressed], seconds: float = 0.0, note: str = "", exact: bool = False
    ) -> None:
        """Takes over the compressed rows (none: the prompt stays whole). Unless the cache is live, layers stop observing."""
        tails = self._tails()
        last = self._report or Report("", "", ())
        self._report = Report(
            method=policy.method.name,
            budget=policy.budget_text,
            tokens=self._tokens(),
            heads=tuple(
                tuple(tuple(Head.of(head, tail) for head in layer) for layer in row.merged)
                for row, tail in zip(rows, tails, strict=False)
            ),
            compress_seconds=seconds + last.compress_seconds,
            longest_pause=max(seconds, last.longest_pause),
            compressions=last.compressions + bool(rows),
            note=note,
            slot_dtype=(policy.stored_as if rows else FLOAT).name,
        )
        self._starts = self.starts
        if rows and self.index is not None:
            self.index = self.index.add(self.keep_layers, min(self.recipe.tail, self.keep_layers[0].tail))
        for index, layer in enumerate(self.keep_layers):
            if rows:
                slots = [row.slots[index].newest_off(tail) for row, tail in zip(rows, tails, strict=True)]
                watch = layer.watch
                if watch is not None and exact:
                    watch = replace(watch, repeat_peak=layer.exact_repeat_peak())
                watch = watch and watch.compacted([row.plan.kept[index] for row in rows], layer.state)
                layer.compact(Slots.cat(slots), min(self.recipe.tail, layer.tail))
                layer.watch = watch
            if not self.live:
                layer.watch = None

    def report(self) -> Report:
        """What was kept, the votes, and the bytes held at this moment."""
        method, budget = self.policy.method.name, self.policy.budget_text
        if not all(layer.is_initialized for layer in self.keep_layers):
            return Report(method, budget, (), note="nothing has been read yet")
        report = self._report or Report(method, budget, self._tokens(), note="not compressed yet")
        others = [x for layer in self.layers if not isinstance(layer, KeepLayer) for x in other_layers.tensors(layer)]
        layers = tuple(index for index, layer in enumerate(self.layers) if isinstance(layer, KeepLayer))
        index_bytes = self.index.bytes if self.index else 0
        report = replace(report, repeat_seconds=self._repeat_seconds, layers=layers, index_bytes=index_bytes)
        return with_bytes_held(report, self.keep_layers, others, self.policy.full_dtype)

    def __repr__(self) -> str:
        report = self.report()
        tokens = self._tokens()
        facts = {
            "method": repr(report.method),
            "budget": repr(report.budget),
            "tokens": tokens[0] if len(tokens) == 1 else list(tokens) or 0,
            "slots_per_head": round(report.slots_per_head, 1) if report.heads else None,
            "tail": report.tail,
            "bytes": render.size(report.kv_bytes),
            "live": self.live,
        }
        return f"KeepCache({', '.join(f'{name}={value}' for name, value in facts.items())})"

    def _repr_html_(self) -> str:
        """For notebooks: the report as a table, and the first row's slots per layer and head as a figure."""
        report = self.report()
        tokens = ", ".join(f"{count:,}" for count in self._tokens()) or "none"
        folding = f"folds every {self.period:,} tokens" if self.live else "no: tokens that come later stay exact"
        return render.html_table({**report.lines(), "tokens": tokens, "live": folding}, report.figure())

    def reset(self) -> None:
        """Forgets everything that was read. The settings stay, but for the tokens to keep, which were of that text."""
        super().reset()  # type: ignore[no-untyped-call]
        self.restore(None)
        self._expected = ()
        self._starts = ()
        self._refreshed = 0
        self.index = self.index and self.index.emptied()
        self.policy = replace(self.policy, spans=())


def _as_if_after(end: int, tokens: int, piece: Tensor) -> dict[str, Any]:
    """Positions and mask that read a piece as after `end` tokens, of which `tokens` are read.

    The mask hides all of them: a layer with full attention attends to what it holds without the mask, and sliding windows will
    have passed the tokens by then.
    """
    own = torch.ones_like(piece)
    return {
        "position_ids": torch.arange(end, end + piece.shape[1], device=piece.device)[None],
        "attention_mask": torch.cat([own.new_zeros(1, tokens), own], dim=1),
    }


def _check_lone_padding(mask: Tensor, size: int) -> None:
    """Raises InputError where a forward pass of one token, in chunks of `size`, would be padding in a row.

    transformers hides padding from layers with a state in every pass but those of one token.
    """
    lone = mask if size == 1 else mask[:, : int(mask.shape[1] % size == 1)]
    if not bool(lone.all()):
        raise InputError(
            "a chunk of one token is padding in a row, and the state of this model's layers would take it in: read the rows "
            f"one by one, or in chunks of another size than {size}"
        )


def _positions(mask: Tensor, lo: int, hi: int) -> Tensor:
    """Positions of columns lo..hi, counted from each row's first real token, as `generate` counts them."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, lo:hi]
