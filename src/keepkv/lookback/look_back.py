"""Looking back: before a question is answered, what it looks for comes back into a fork of the compact cache.

    rank -> spans -> bring back -> read the question -> answer

The compact cache itself stays as it is, bit for bit: what one question brings back, no other question sees.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv.cache import KeepCache
from keepkv.cache.index import Index
from keepkv.lookback.bring_back import Source, brought_back, tokens
from keepkv.lookback.copying_heads import copying_heads
from keepkv.lookback.rank import SINKS, looks
from keepkv.lookback.spans import Span, allowed, count, difference, in_turn
from keepkv.lookback.words import Words
from keepkv.recipe import Recipe

FLAT = 0.06  # a question that pays no token of the text more than this looks nowhere in particular: docs/notes/lookback.md
SHORT = 4000  # tokens of a text up to which "auto" is 256 tokens; 512 beyond


@dataclass(frozen=True)
class Sources:
    """What came back for a question.

    Attributes:
        spans: The tokens (first, last + 1), in the text's order; none if the question looks nowhere in particular.
        ranked_by: What they were ranked by: "index", "words".
        peak: The largest share that the question pays a token of the text, see `rank.looks`.
        bytes: What the fork that the question is asked of holds more than the compact cache.
        index_bytes: Bytes of the index.
        seconds: Of ranking and bringing back.
        texts: The spans in words.
    """

    spans: tuple[Span, ...]
    ranked_by: tuple[str, ...]
    peak: float
    bytes: int
    index_bytes: int
    seconds: float
    texts: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """How many came back."""
        return count(self.spans)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "index_bytes": self.index_bytes,
            "seconds": round(self.seconds, 4),
            "ranked_by": list(self.ranked_by),
            "peak": round(self.peak, 6),
            "spans": [list(span) for span in self.spans],
            "texts": list(self.texts),
        }


class LookedBack(NamedTuple):
    """A fork of a compact cache with what a question needs, to ask the question of; and what that is."""

    cache: KeepCache
    sources: Sources


def look_back(
    model: PreTrainedModel,
    cache: KeepCache,
    question: Tensor,
    source: Source,
    allowance: int,
    by_words: Sequence[int] | None = None,
    lead: int = SINKS,
    asking: Span | None = None,
) -> LookedBack:
    """Ranks a text's spans by a question, and brings the best ones back.

    The spans that the index ranks and those that the words rank take turns, since attention and words find different things. Of
    both rankings only those come back that are nearly as good as the best one, so that the allowance need not be spent.

    Args:
        model: The cache's model.
        cache: A compact cache with an index, of one row. It is not changed.
        question: Token ids [1, n].
        source: Where the spans come from, see `bring_back.tokens` and `bring_back.exact`.
        allowance: Tokens that may come back, at most.
        by_words: Numbers of the spans that share words with the question, the best first; None: words are not looked at.
        lead: See `rank.looks`.
        asking: See `rank.looks`.

    Raises:
        KeepKVError: for a cache without an index, for a batch, and what the source raises.
        InputError: for an allowance of less than one span.
    """
    start = time.perf_counter()
    by_index = looks(model, cache, question, lead, asking)
    index = cache.index
    assert index is not None, "looks() checks that first"
    spans: list[Span] = []
    if by_index.peak > FLAT:
        spans = allowed(in_turn(by_index.spans[: by_index.near], by_words or ()), index.tokens, allowance)
    fork = brought_back(cache, spans, source)
    sources = Sources(
        spans=tuple(spans),
        ranked_by=("index",) if by_words is None else ("index", "words"),
        peak=by_index.peak,
        bytes=fork.report().kv_bytes - cache.report().kv_bytes,
        index_bytes=index.bytes,
        seconds=time.perf_counter() - start,
    )
    return LookedBack(fork, sources)


class Looking(NamedTuple):
    """What looking back at one text needs, made once for all its questions.

    Attributes:
        model, tokenizer: The cache's.
        ids: The text's token ids [1, T].
        allowance: Tokens that may come back for a question.
        words: The text's words; None without the package bm25s (`keepkv[eval]`): then only the index ranks.
        lead: See `rank.looks`.
        empty: Token ids [1, m] of a question without words: what the chat template puts around one. None: nothing.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: Tensor
    allowance: int
    words: Words | None
    lead: int = SINKS
    empty: Tensor | None = None

    @staticmethod
    def of(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ids: Tensor,
        recipe: Recipe,
        lead: int = SINKS,
        empty: Tensor | None = None,
    ) -> Looking | None:
        """As the recipe has it; None if it does not look back."""
        most = allowance(recipe, ids.shape[1])
        words = Words.of(tokenizer, ids) if most and Words.available() else None
        return Looking(model, tokenizer, ids, most, words, lead, empty) if most else None

    def back(self, cache: KeepCache, question_ids: Tensor, question: str) -> LookedBack:
        """Looks back for a question, with the text's tokens as the source. See `look_back`."""
        by_words = None if self.words is None else self.words.ranked(question)
        source = tokens(self.model, self.ids)
        asking = self.own_words(question_ids)
        fork, sources = look_back(self.model, cache, question_ids, source, self.allowance, by_words, self.lead, asking)
        return LookedBack(fork, self._in_words(sources))

    def own_words(self, question_ids: Tensor) -> Span | None:
        """Which of a question's tokens are its own words, see `rank.looks`."""
        return None if self.empty is None else difference(question_ids[0].tolist(), self.empty[0].tolist())

    def _in_words(self, sources: Sources) -> Sources:
        texts = (self.tokenizer.decode(self.ids[0, first:last], skip_special_tokens=True) for first, last in sources.spans)
        return Sources(**{**vars(sources), "texts": tuple(map(str, texts))})


def indexed(model: PreTrainedModel, cache: KeepCache, recipe: Recipe) -> KeepCache:
    """The same new cache, which will keep an index of what it reads if the recipe looks back."""
    if recipe.lookback != "off":
        cache.index = Index.by(copying_heads(model))
    return cache


def allowance(recipe: Recipe, tokens: int) -> int:
    """Tokens that a recipe lets come back into the cache of a text of so many tokens. 0: it does not look back.

    Example:
        >>> allowance(Recipe(lookback="auto"), 10_000), allowance(Recipe(lookback=128), 10_000), allowance(Recipe(), 10_000)
        (512, 128, 0)
    """
    if isinstance(recipe.lookback, int):
        return recipe.lookback
    return 0 if recipe.lookback == "off" else 256 if tokens <= SHORT else 512
