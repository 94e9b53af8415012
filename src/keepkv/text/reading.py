"""Reading: a text and questions cut into tokens, and the text read, and repeated if wanted, before it is compressed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from keepkv.cache import KeepCache
from keepkv.compress import Progress
from keepkv.methods import Method
from keepkv.models.families import trained_length
from keepkv.observe.repetition import Repeat
from keepkv.recipe import Recipe, RepeatMode

REPEAT = "Repeat the text above, word for word."
_REPEAT_ROOM = 512  # one repeated piece and the instruction
Phase = Callable[[str], Progress]  # starts a phase of that title; returns what to tell its progress to


def silent(title: str) -> Progress:
    """A phase that nobody watches."""
    return lambda done, of: None


class Reading(NamedTuple):
    """A cache that has read a text, and the seconds that took; the same after repeating it, in every way that is wanted.

    It is not compressed yet, or, if the text was read in chunks, has been on the way.
    """

    cache: KeepCache
    seconds: float
    repeated: Mapping[Repeat, tuple[KeepCache, float]]

    def of(self, method: Method) -> KeepCache:
        """A fork of the cache, as the method wants it."""
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
    model: PreTrainedModel, ids: Tensor, methods: Sequence[Method], recipe: Recipe, lead: Tensor | None = None,
    phase: Phase = silent,
) -> Reading:  # fmt: skip
    """Reads ids [1, T] at once, and repeats them after lead [1, n] where `repeats` says so, for all the methods together."""
    settings = replace(recipe, budget="100%", chunk=0)  # every method is given its budget when it compresses
    column_mass = any(method.column_mass for method in methods)
    cache = KeepCache.of(model, settings, column_mass=column_mass, auto=False)
    phase(f"reading {ids.shape[1]:,} tokens")
    start = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1)
    seconds, repeated = time.perf_counter() - start, {}
    for how in dict.fromkeys(method.repeat for method in methods):
        if how is not None and repeats(recipe.repeat, model, how, ids.shape[1]):
            start, twin = time.perf_counter(), cache.fork()
            twin.repeat(model, ids, lead, how, phase("repeating the text"))
            repeated[how] = twin, time.perf_counter() - start
    return Reading(cache, seconds, repeated)


def read_in_chunks(
    model: PreTrainedModel, ids: Tensor, method: Method, recipe: Recipe, lead: Tensor | None = None,
    spans: Sequence[tuple[int, int]] = (), phase: Phase = silent,
) -> Reading:  # fmt: skip
    """Reads ids [1, T] `recipe.chunk` tokens at a time, compressing as it goes: memory does not grow with the text."""
    cache = KeepCache.of(model, replace(recipe, method=method))
    how = method.repeat
    again = how is not None and repeats(recipe.repeat, model, how, ids.shape[1])
    start = time.perf_counter()
    cache.read(
        model, ids, repeat=lead if again else None, keep=spans,
        progress=phase(f"reading {ids.shape[1]:,} tokens in chunks ({method.name})"),
    )  # fmt: skip
    seconds, report = time.perf_counter() - start, cache.report()
    repeated = {how: (cache, report.repeat_seconds)} if how is not None and again else {}
    return Reading(cache, seconds - report.compress_seconds - report.repeat_seconds, repeated)


def repeats(mode: RepeatMode, model: PreTrainedModel, how: Repeat, tokens: int) -> bool:
    """Whether to repeat a text of so many tokens: it is needed, or wanted, or ("auto") within the trained length."""
    if mode != "auto" or how.needed:
        return how.needed or mode == "always"
    trained = trained_length(model)
    return trained is None or tokens + _REPEAT_ROOM <= trained
