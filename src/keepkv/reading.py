"""Reading: a text and questions cut into tokens, and the text read, and repeated if wanted, before it is compressed."""

from __future__ import annotations

import re
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv.cache import KeepCache
from keepkv.compress import Progress
from keepkv.errors import InputError
from keepkv.loading import trained_length
from keepkv.method import Method
from keepkv.recall import Repeat

CHUNK = 2048  # tokens of a chunk, where a text is read in chunks
LONG = 8192  # tokens from which on it is, unless something else is asked for
REPEAT = "Repeat the text above, word for word."
_REPEAT_ROOM = 512  # one repeated piece and the instruction
_MARK = "\u2402keepkv\u2403"  # stands before the text and where the question will be, while the chat template is applied

Phase = Callable[[str], Progress]  # starts a phase of that title; returns what to tell its progress to


def silent(title: str) -> Progress:
    """A phase that nobody watches."""
    return lambda done, of: None


class Prompt:
    """A text and questions about it, cut into tokens: `text` is read once, `question(q)` is appended to it.

    lead: how many tokens of `text` the chat template puts before it. before, after: what stands around a question. Text and
    question are two line breaks apart, and the cut is between those: most tokenizers cut there too where they see the whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        """Applies the chat template if there is one; the text and then the question are the user's message."""
        self._tokenizer = tokenizer
        if tokenizer.chat_template:
            message = [{"role": "user", "content": f"{_MARK}{text.strip()}\n\n{_MARK}"}]
            whole = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            opening, body, self.after = str(whole).split(_MARK)
            body, self.before = body.removesuffix("\n"), "\n"
        else:
            opening, body, self.before, self.after = "", f"{text.strip()}\n", "\nQuestion: ", "\nAnswer:"
        self._read, self._special = opening + body, not tokenizer.chat_template
        self.text: Tensor = self._cut(self._read)
        pairs = zip(self._cut(opening)[0].tolist(), self.text[0].tolist(), strict=False)
        self.lead = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _cut(self, text: str) -> Tensor:
        ids: Tensor = self._tokenizer(text, add_special_tokens=self._special, return_tensors="pt", verbose=False)["input_ids"]
        return ids.long()

    def spans(self, *patterns: str) -> list[tuple[int, int]]:
        """The tokens (first, last + 1) of every match of regular expressions in what is read. Raises InputError."""
        found = [span for pattern in patterns for span in self._matches(pattern)]
        if not found:
            return []
        if not self._tokenizer.is_fast:
            raise InputError(
                "this model's tokenizer does not say where its tokens stand in the text: nothing can be kept by name"
            )
        places = self._tokenizer(self._read, add_special_tokens=self._special, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        starts, ends = [lo for lo, _ in places], [hi for _, hi in places]  # both ascend
        spans = [(bisect_right(ends, first), bisect_left(starts, last)) for first, last in found]
        return [span for span in spans if span[0] < span[1]]

    def _matches(self, pattern: str) -> list[tuple[int, int]]:
        try:
            found = [match.span() for match in re.finditer(pattern, self._read) if match[0]]
        except re.error as error:
            raise InputError(f"{pattern!r} is not a regular expression: {error}") from None
        if not found:
            raise InputError(f"nothing in the text matches {pattern!r}, so there is nothing to keep")
        return found

    def question(self, question: str) -> Tensor:
        """Token ids [1, n] of a question and what stands around it."""
        return asked(self._tokenizer, question, self.before, self.after)


def asked(tokenizer: PreTrainedTokenizerBase, question: str, before: str, after: str) -> Tensor:
    """Token ids [1, n] of a question and what stands around it."""
    ids: Tensor = tokenizer(before + question.strip() + after, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return ids


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

    def reference(self, method: Method) -> str:
        """Which queries the method is given, "recall" or "context"."""
        return "recall" if method.repeat in self.repeated else "context"

    def repeat_cost(self, method: Method) -> float:
        """Seconds of the repetition, if the method uses it."""
        return self._of(method)[1]

    def _of(self, method: Method) -> tuple[KeepCache, float]:
        return self.repeated.get(method.repeat, (self.cache, 0.0)) if method.repeat else (self.cache, 0.0)


def read(
    model: PreTrainedModel,
    ids: Tensor,
    table: Sequence[Method],
    lead: Tensor | None = None,
    seed: int = 0,
    reference: str = "auto",
    phase: Phase = silent,
    slots: str = "float",
) -> Reading:
    """Reads ids [1, T] and repeats them after lead [1, n] where `repeats` says so, for all the methods of the table."""
    cache = KeepCache(model, seed=seed, column_mass=any(method.column_mass for method in table), slots=slots, auto=False)
    phase(f"reading {ids.shape[1]:,} tokens")
    start = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1)
    seconds, repeated = time.perf_counter() - start, {}
    for how in dict.fromkeys(method.repeat for method in table):
        if how is not None and repeats(reference, model, how, ids.shape[1]):
            start, twin = time.perf_counter(), cache.fork()
            twin.rehearse(model, ids, lead, how, phase("repeating the text"))
            repeated[how] = twin, time.perf_counter() - start
    return Reading(cache, seconds, repeated)


def read_in_chunks(
    model: PreTrainedModel,
    ids: Tensor,
    method: Method,
    budget: str,
    chunk: int,
    lead: Tensor | None = None,
    seed: int = 0,
    reference: str = "auto",
    keep: Sequence[tuple[int, int]] = (),
    phase: Phase = silent,
    slots: str = "float",
) -> Reading:
    """Reads ids [1, T] `chunk` tokens at a time, compressing as it goes, so that memory does not grow with the text."""
    cache = KeepCache(model, budget, method, chunk=chunk, seed=seed, slots=slots)
    how = method.repeat
    again = how is not None and repeats(reference, model, how, ids.shape[1])
    start = time.perf_counter()
    cache.read(
        model, ids, repeat=lead if again else None, keep=keep,
        progress=phase(f"reading {ids.shape[1]:,} tokens in chunks ({method.name})"),
    )  # fmt: skip
    seconds, report = time.perf_counter() - start, cache.report()
    repeated = {how: (cache, report.repeat_seconds)} if how is not None and again else {}
    return Reading(cache, seconds - report.compress_seconds - report.repeat_seconds, repeated)


def repeats(reference: str, model: PreTrainedModel, how: Repeat, tokens: int) -> bool:
    """Whether to rehearse a text of so many tokens: it is needed, or wanted, or ("auto") within the trained length."""
    if reference != "auto" or how.needed:
        return how.needed or reference == "recall"
    trained = trained_length(model)
    return trained is None or tokens + _REPEAT_ROOM <= trained
