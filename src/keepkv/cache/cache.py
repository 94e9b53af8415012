"""KeepCache: a transformers cache that becomes physically smaller as tokens are read and written."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv import methods
from keepkv.budget import BudgetLike
from keepkv.cache.base import BaseCache
from keepkv.cache.layer import KeepLayer
from keepkv.cache.observations import Observations, check_observed
from keepkv.cache.policy import Policy
from keepkv.cache.report import Head, Report, weighed
from keepkv.compress import Compressed, Progress, compress, in_row
from keepkv.errors import BudgetError, InputError, KeepKVError
from keepkv.methods import Method
from keepkv.observe.repetition import Piece, Repeat
from keepkv.recipe import BackingKind, Recipe
from keepkv.slots.quantized import FLOAT
from keepkv.slots.slots import Slots

if TYPE_CHECKING:
    from typing_extensions import Self

OVERLAP = 8  # tokens of the previous chunk that a repetition starts from


class KeepCache(BaseCache):
    """A cache of `budget` slots: `model.generate(**inputs, past_key_values=KeepCache(model, budget="10%"))`.

    The first forward pass of more than one token is the prompt. When it has been read, it is compressed by `method`; later
    tokens stay exact. With `auto=False` nothing happens until `compress()` is called, so that one reading can be compressed in
    several ways (`fork`), or before a question is asked.

    With a `period` the cache is live: whenever so many tokens have come since, they are folded into the compact part, which is
    then compressed again to its budget, so that memory does not grow with what is written. With a `chunk` it is the same while
    reading: no forward pass may have more tokens (`read` cuts a prompt, `generate` with prefill_chunk_size), and the period is
    the chunk if not given. A live cache holds at most budget + tail + period (or chunk) tokens, and queries (`references`).

    Args:
        model: Any supported transformers model with `sdpa` attention. It is not changed, and not held.
        budget: See `Recipe`; a share is that of the tokens read so far. A list has one for each row of the batch.
        method: See `Recipe`.
        slot_dtype: See `Recipe`. All that is compressed is rounded, also where the budget holds every token; newer tokens and
            the method "full" are exact.
        period: See above.
        chunk: See above; None or 0: a prompt is read at once.
        tail: The newest tokens, on top of the budget, that are left out of every compression, so that `crop` can forget them
            (assisted generation needs that).
        backing: "cpu" or "disk" keeps the exact keys and values of all tokens there; `refresh()` then rebuilds the compact
            part from them.
        refresh: With a backing, that happens by itself every so many tokens, so that the error of many folds does not add up.
        references: How many of each layer's queries are remembered at most until the next compression, whatever the length;
            a live cache keeps half of them beyond it, all in bfloat16. Fewer take less memory and time, and fit worse.
        seed: Of what is drawn by chance.
        column_mass: Whether all attention is summed while reading, for methods that need it. Default: if `method` does.
        auto: Whether to compress when a prompt has been read, and live caches when it is due.

    Raises:
        ModelError: for a model that cannot be compressed.
        BudgetError, MethodError, InputError: for settings that cannot be read or do not go together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        budget: BudgetLike | Sequence[BudgetLike] = Recipe.budget,
        method: str | Method = Recipe.method,
        *,
        slot_dtype: str = Recipe.slot_dtype,
        period: int | None = Recipe.period,
        chunk: int | None = Recipe.chunk,
        tail: int = Recipe.tail,
        backing: BackingKind | None = Recipe.backing,
        refresh: int | None = Recipe.refresh,
        references: int = Recipe.references,
        seed: int = Recipe.seed,
        column_mass: bool | None = None,
        auto: bool = True,
    ) -> None:
        policy = Policy.of(budget, method, slot_dtype)
        recipe = Recipe(
            budget if isinstance(budget, BudgetLike | int) else tuple(budget), policy.method, slot_dtype, chunk=chunk,
            period=period, tail=tail, backing=backing, refresh=refresh, references=references, seed=seed,
        )  # fmt: skip
        sizes = {"period": period, "chunk": chunk or None, "tail": tail + 1, "refresh": refresh, "references": references}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise InputError(f"{name}: expected a positive number of tokens")
        if (refresh is not None and backing is None) or (backing is not None and period is None and not chunk):
            raise InputError("refresh needs a backing, and a backing a live cache: give a period, or a chunk, and a backing")
        super().__init__(model, recipe, policy, policy.method.column_mass if column_mass is None else column_mass, auto)
        self._ahead = 0  # tokens that `read` has still to read of a prompt that it has repeated
        self._refreshed = 0  # columns at the last refresh

    @classmethod
    def of(cls, model: PreTrainedModel, recipe: Recipe, *, column_mass: bool | None = None, auto: bool = True) -> Self:
        """A cache with a recipe's settings; what is about texts (repeat, keep, tolerance, exact) is its reader's."""
        return cls(
            model, recipe.budget, recipe.method, slot_dtype=recipe.slot_dtype, period=recipe.period, chunk=recipe.chunk,
            tail=recipe.tail, backing=recipe.backing, refresh=recipe.refresh, references=recipe.references, seed=recipe.seed,
            column_mass=column_mass, auto=auto,
        )  # fmt: skip

    @property
    def _due(self) -> bool:
        """Whether enough tokens have come since the last compression for the next one."""
        return self.period is not None and self.keep_layers[0].tail >= self.period + self.recipe.tail

    def _after_forward(self, new: int) -> None:
        """Compresses the prompt when it has been read, and what came later when it is due."""
        first = not self.compressed and new > 1 and not self._expected
        if first and not self.live:
            try:
                self.compress()
            except BudgetError as error:  # a prompt of a few tokens: nobody's generation should fail for that
                warnings.warn(f"the prompt stays whole: {error}", stacklevel=2)
                self._settle(self.policy, [], note=f"left whole: {error}")
        elif first or self._due:
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
        """Reads a prompt [B, T] of any length, `chunk` tokens at a time, and compresses whenever it outgrows the budget.

        A share is that of the whole prompt, so that its first chunks stay whole as long as there is room. The first chunk is
        the shortest: so a row of a left-padded batch is cut as if alone.

        Args:
            model: The model that the cache was made for.
            input_ids: int64 [B, T].
            attention_mask: [B, T] or [B, tokens read before + T]; rows may be padded on the left.
            repeat: An instruction [1, n] to repeat the text, in the model's chat format. Each chunk is then repeated (see
                `repeat`) before it is compressed, also without it for a method that needs it, and compressed with the method's
                `midway` merge until all has been read.
            keep: As in `compress`.
            progress: Called with (tokens read, tokens in all).

        Returns:
            The cache itself.

        Raises:
            InputError: for an attention mask of another shape.
            KeepKVError: as `repeat` and `compress` do; the spans to keep are then as before.
        """
        batch, length = input_ids.shape
        size = self.chunk or max(1, length)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        before = self.get_seq_length()
        if mask.shape[1] not in (length, before + length):
            raise InputError(f"attention mask {list(mask.shape)}: expected [{batch}, {length}] or [{batch}, {before + length}]")
        seen = self._tokens() if before else (0,) * batch
        self._expected = tuple(a + b for a, b in zip(seen, mask[:, -length:].sum(1).tolist(), strict=True))
        if mask.shape[1] == length and before:
            starts = [before - count for count in seen]
            columns = torch.arange(before, device=mask.device).expand(batch, -1)
            mask = torch.cat([(columns >= torch.tensor(starts, device=mask.device)[:, None]).to(mask.dtype), mask], 1)
        padded = not bool(mask.all())
        method = self.policy.method
        if repeat is None and method.repeat is not None and method.repeat.needed:
            repeat = input_ids[:, :0]
        auto, self.auto, policy = self.auto, False, self.policy
        self.policy = policy.changed(spans=keep)
        try:
            lo = 0
            while lo < length:
                hi = lo + ((length - lo) % size or size)
                self._ahead = 0 if repeat is None else length - hi
                model(
                    input_ids[:, lo:hi], past_key_values=self, logits_to_keep=1,
                    **({"attention_mask": mask[:, : before + hi], "position_ids": _positions(mask, before + lo, before + hi)}
                       if padded else {}),
                )  # fmt: skip
                if repeat is not None:
                    self.repeat(model, input_ids[:, lo:hi], repeat)
                if self.live and (self._due or hi < length or lo or (auto and before == 0)):
                    self.compress()
                lo = hi
                progress(lo, length)
            if auto and not self.live:
                self.compress()
        except KeepKVError:
            self.policy = policy
            raise
        finally:
            self.auto, self._ahead = auto, 0
        return self

    @torch.no_grad()
    def repeat(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        lead: Tensor | None = None,
        how: Repeat | None = None,
        progress: Progress = lambda done, of: None,
    ) -> Self:
        """Repeats the text that was just read over its own cache and observes what that asks for; then `compress`.

        What a model needs to repeat a text word for word is what it needs to answer about its details. By default each piece of
        256 tokens sees itself exactly and the rest as in a draft, an eviction to 1/16: about one more reading, linear in the
        length. In the middle of a prompt that `read` reads in chunks it is asked from where that will end, as questions will
        be. After KVzip, arXiv 2505.23416.

        Args:
            model: The model that the cache was made for.
            input_ids: int64 [1, n], the newest n tokens, not compressed yet.
            lead: An instruction [1, m] to repeat them, in the model's chat format.
            how: How the text is repeated; as the method has it if not given.
            progress: Called with (tokens repeated, tokens in all).

        Raises:
            KeepKVError: for a batch, and for another text than the newest.
        """
        tokens, tail = self.keep_layers[0].seen, self.keep_layers[0].tail
        wrong = input_ids.dim() != 2 or not 0 < input_ids.shape[1] <= tail or (self.compressed and not self.live)
        if wrong or len(input_ids) != 1 or self._tokens() != (tokens,) or (not self.live and input_ids.shape[1] != tail):
            raise KeepKVError(
                f"repeat() repeats the text that was just read, before compression, one row: expected [1, {tail}] "
                f"token ids, got {list(input_ids.shape)}"
            )
        start = time.perf_counter()
        lead = input_ids[:, :0] if lead is None else lead.to(input_ids.device)
        self._bank()
        how = how or self.policy.method.repeat or Repeat()
        observations = Observations(self.keep_layers, 0, self.inv_freq, self._projections)
        begin, end = tokens - input_ids.shape[1], tokens + self._ahead
        room = self._entries(0) + self._tails()[0] * self.heads
        size = max(room // self.heads // how.draft, 2 * how.chunk)  # the draft has at least two pieces' worth
        drafts = compress(observations, methods.get("snapkv"), min(room, size * self.heads)).slots
        for lo in range(begin, tokens, how.chunk):
            first, last = max(begin, lo - OVERLAP), min(lo + how.chunk, tokens)
            fed = torch.cat([lead, input_ids[:, first - begin : last - begin]], dim=1)
            twin = self.fork()
            twin._piece = Piece(first, last, drafts, how)
            model(fed, past_key_values=twin, logits_to_keep=1, **(_far(tokens, end, fed) if end > tokens else {}))
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
        """Compresses everything held, but for the newest `tail` tokens, in place, and returns the cache itself.

        A budget of all the tokens changes nothing at all, unless slots are quantized. A live cache can be compressed again and
        again: slots and newer tokens together make the new slots, votes and fitted values are merged further. What is given
        here holds from now on.

        Args:
            budget: As in the constructor.
            method: As in the constructor.
            progress: Called with (steps done, steps in all).
            keep: Spans of tokens, (first, last + 1), that keep their slots in every head, also later on, untouched unless the
                method merges keys or slots are quantized; for one row.
            slot_dtype: As in the constructor.

        Raises:
            BudgetError: for a budget below what must be kept (a live cache waits instead).
            KeepKVError: if nothing was read, if the cache is compressed already and not live, or if the method needs what was
                not observed. The cache and its settings are then as before.
        """
        policy = self.policy.changed(budget, method, slot_dtype, keep)
        self._compress(policy, progress)
        self.policy = policy
        return self

    @torch.no_grad()
    def refresh(self, progress: Progress = lambda done, of: None) -> Self:
        """Rebuilds the compact part from the exact keys and values of all tokens, with the queries seen until now.

        The periodic lossless compression of KeepKV (arXiv 2504.09936v2): what earlier folds lost is back. One layer's keys
        and values are on the device at a time. Raises KeepKVError without a backing, or for a method that sums attention.
        """
        if any(layer.backing is None for layer in self.keep_layers):
            raise KeepKVError('nothing to refresh from: KeepCache(..., backing="cpu") or "disk" keeps exact keys and values')
        if self.policy.method.column_mass:
            raise KeepKVError(f"{self.policy.method.name} sums attention: what dropped tokens would have got is not known")
        self._compress(self.policy, progress, exact=True)
        self._refreshed = self.get_seq_length()
        return self

    def _compress(self, policy: Policy, progress: Progress, exact: bool = False) -> None:
        start = time.perf_counter()
        self._check(policy)
        tokens, tails = self._tokens(), self._tails()
        expected = self._expected or (0,) * len(tokens)
        try:
            totals = [
                policy.total_slots(row, max(counts), self.keep_layers)
                for row, counts in enumerate(zip(tokens, expected, strict=True))
            ]
        except BudgetError:
            if not self.live:
                raise
            return  # too few tokens as yet
        held = [(count - tails[row]) * self.heads if exact else self._entries(row) for row, count in enumerate(tokens)]
        if not exact and not policy.stored_as.bits and all(total >= own for total, own in zip(totals, held, strict=True)):
            if not self.live:
                self._settle(policy, [], note="left whole: the budget holds every token")
            return

        self._bank()
        method = policy.method.in_the_middle if self._ahead else policy.method
        rows: list[Compressed] = []
        for row, total in enumerate(totals):
            slots = min(total, held[row]) + tails[row] * self.heads
            observations = Observations(
                self.keep_layers, row, self.inv_freq, self._projections, policy.spans, tails[row], exact
            )
            rows.append(compress(observations, method, slots, partial(in_row, progress, row, len(totals)), policy.stored_as))
        self._settle(policy, rows, time.perf_counter() - start, exact=exact)

    def _check(self, policy: Policy) -> None:
        """Raises KeepKVError unless what is held can be compressed by the policy."""
        if (self.compressed and not self.live) or any(layer.watch is None for layer in self.keep_layers):
            state = "is compressed already" if self.compressed else "has read nothing yet"
            raise KeepKVError(
                f"this cache {state}: read a prompt into a new KeepCache, and fork() it before compressing; "
                "KeepCache(..., period=n) can be compressed again"
            )
        check_observed(policy.method, self.keep_layers, policy.slot_dtype)
        rows = len(self._tokens())
        if policy.spans and rows > 1:
            raise KeepKVError("keep names tokens of one text: this cache has read a batch")
        if len(policy.budgets) not in (1, rows):
            raise KeepKVError(f"{len(policy.budgets)} budgets for {rows} rows: give one for each, or one for all")

    def _settle(
        self, policy: Policy, rows: Sequence[Compressed], seconds: float = 0.0, note: str = "", exact: bool = False
    ) -> None:
        """Takes over what `compress` made of the rows (nothing: the prompt stays whole); unless live, stops observing."""
        last, tails = self._report, self._tails()
        self._report = Report(
            method=policy.method.name,
            budget=policy.budget_text,
            tokens=self._tokens(),
            heads=tuple(
                tuple(tuple(Head.of(head, tail) for head in layer) for layer in row.merged)
                for row, tail in zip(rows, tails, strict=False)
            ),
            compress_seconds=seconds + (last.compress_seconds if last else 0),
            longest_pause=max(seconds, last.longest_pause if last else 0),
            compressions=(last.compressions if last else 0) + bool(rows),
            note=note,
            slot_dtype=(policy.stored_as if rows else FLOAT).name,
        )
        for index, layer in enumerate(self.keep_layers):
            if rows:
                parts = [row.slots[index].newest_off(tail) for row, tail in zip(rows, tails, strict=True)]
                watch = layer.watch
                if watch is not None and exact:
                    watch = replace(watch, repeat_peak=layer.exact_repeat_peak())
                watch = watch and watch.compacted([row.plan.kept[index] for row in rows], layer.state)
                layer.compact(Slots.cat(parts), min(self.recipe.tail, layer.tail))
                layer.watch = watch
            if not self.live:
                layer.watch = None

    def report(self) -> Report:
        """What was kept, the votes, and the bytes held at this moment."""
        name, budget = self.policy.method.name, self.policy.budget_text
        if not self.keep_layers[0].is_initialized:
            return Report(name, budget, (), note="nothing has been read yet")
        known = self._report or Report(name, budget, self._tokens(), note="not compressed yet")
        sliding = [x for layer in self.layers if not isinstance(layer, KeepLayer) for x in (layer.keys, layer.values)]
        return weighed(replace(known, repeat_seconds=self._repeat_seconds), self.keep_layers, sliding)

    def reset(self) -> None:
        """As new, with the same settings."""
        super().reset()  # type: ignore[no-untyped-call]
        self.restore(None)
        self._expected, self._refreshed = (), 0
        self.policy = replace(self.policy, spans=())


def _far(tokens: int, end: int, fed: Tensor) -> dict[str, Any]:
    """Asks as after `end` tokens, of which `tokens` are read: sliding windows will have passed these by then."""
    own = torch.ones_like(fed)
    return {
        "position_ids": torch.arange(end, end + fed.shape[1], device=fed.device)[None],
        "attention_mask": torch.cat([own.new_zeros(1, tokens), own], dim=1),
    }


def _positions(mask: Tensor, lo: int, hi: int) -> Tensor:
    """Positions of columns lo..hi, counted from each row's first real token, as `generate` counts them."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, lo:hi]
