"""Reading: a text is read into a cache, and repeated over it where that is wanted, before it is compressed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from keepkv.cache import KeepCache
from keepkv.compress import Progress
from keepkv.lookback.look_back import indexed
from keepkv.methods import Method
from keepkv.models.families import trained_length
from keepkv.observe.repetition import Repeat
from keepkv.recipe import Recipe, RepeatMode

REPEAT = "Repeat the text above, word for word."
_REPEAT_ROOM = 512  # one repeated piece and the instruction
Phase = Callable[[str], Progress]  # called with a phase's title; returns what is called with its (steps done, steps in all)


def silent(title: str) -> Progress:
    """A phase that nobody watches."""
    return lambda done, of: None


class Reading(NamedTuple):
    """A cache that has read a text, and caches that have also repeated it, in every way that a method wants.

    They are not compressed yet; or, if the text was read in chunks, have been compressed on the way.

    Attributes:
        cache: It has read the text.
        seconds: How long that took.
        repeated: For every way of repeating, a cache that has done so too, and the seconds of the repetition.
    """

    cache: KeepCache
    seconds: float
    repeated: Mapping[Repeat, tuple[KeepCache, float]]

    def of(self, method: Method) -> KeepCache:
        """A fork of the cache that the method wants: repeated, or not."""
        return self._of(method)[0].fork()

    def is_repeated(self, method: Method) -> bool:
        """Whether the method is given what a repetition of the text asked for."""
        return method.repeat in self.repeated

    def repeat_cost(self, method: Method) -> float:
        """Seconds of the repetition, if the method uses it."""
        return self._of(method)[1]

    def _of(self, method: Method) -> tuple[KeepCache, float]:
        return self.repeated.get(method.repeat, (self.cache, 0.0)) if method.repeat else (self.cache, 0.0)


def read(
    model: PreTrainedModel,
    ids: Tensor,
    methods: Sequence[Method],
    recipe: Recipe,
    lead: Tensor | None = None,
    phase: Phase = silent,
) -> Reading:
    """Reads a text at once, for several methods together, and repeats it where `repeats` says so.

    Args:
        model: Any supported model.
        ids: Token ids [1, T].
        methods: What will compress it.
        recipe: Its budget is not used: every method gets it when it compresses.
        lead: An instruction [1, n] to repeat the text, in the model's chat format.
        phase: Told what is under way.
    """
    settings = replace(recipe, budget="100%", chunk=0)
    column_mass = any(method.column_mass for method in methods)
    cache = indexed(model, KeepCache.of(model, settings, column_mass=column_mass, auto=False), recipe)
    phase(f"reading {ids.shape[1]:,} tokens")
    start = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=cache.last_logits)
    seconds = time.perf_counter() - start
    repeated = {}
    for how in dict.fromkeys(method.repeat for method in methods):
        if how is not None and repeats(recipe.repeat, model, how, ids.shape[1]):
            start = time.perf_counter()
            twin = cache.fork()
            twin.repeat(model, ids, lead, how, phase("repeating the text"))
            repeated[how] = twin, time.perf_counter() - start
    return Reading(cache, seconds, repeated)


def read_in_chunks(
    model: PreTrainedModel,
    ids: Tensor,
    method: Method,
    recipe: Recipe,
    lead: Tensor | None = None,
    spans: Sequence[tuple[int, int]] = (),
    phase: Phase = silent,
) -> Reading:
    """Reads a text `recipe.chunk` tokens at a time and compresses it on the way: memory does not grow with the text.

    Args:
        model: Any supported model.
        ids: Token ids [1, T].
        method: What compresses it.
        recipe: How.
        lead: As in `read`.
        spans: Tokens (first, last + 1) that keep their slots.
        phase: Told what is under way.
    """
    cache = indexed(model, KeepCache.of(model, replace(recipe, method=method)), recipe)
    how = method.repeat
    repeating = how is not None and repeats(recipe.repeat, model, how, ids.shape[1])
    progress = phase(f"reading {ids.shape[1]:,} tokens in chunks ({method.name})")
    start = time.perf_counter()
    cache.read(model, ids, repeat=lead if repeating else None, keep=spans, progress=progress)
    seconds = time.perf_counter() - start
    report = cache.report()
    repeated = {how: (cache, report.repeat_seconds)} if how is not None and repeating else {}
    return Reading(cache, seconds - report.compress_seconds - report.repeat_seconds, repeated)


def repeats(mode: RepeatMode, model: PreTrainedModel, how: Repeat, tokens: int) -> bool:
    """Whether to repeat a text: where the method needs it, always, or (mode "auto") where the trained length allows it."""
    if mode != "auto" or how.needed:
        return how.needed or mode == "always"
    trained = trained_length(model)
    return trained is None or tokens + _REPEAT_ROOM <= trained
