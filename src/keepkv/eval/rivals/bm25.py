"""BM25: retrieval as plain text. The passages that share most words with the question are read, and nothing else is.

Okapi BM25 (Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework") in Lucene's variant, by the package bm25s
(arXiv 2407.03618): pip install 'keepkv[eval]'. The question is known before anything is read, which no cache that is compressed
beforehand can say. So this rival has an advantage, and costs a reading for every question.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from keepkv.budget import Budget
from keepkv.cache import KeepCache
from keepkv.errors import InputError
from keepkv.eval.measure import CompressedReading, Measure, Outcome, Setup, asked
from keepkv.eval.rivals.rival import Rival
from keepkv.eval.sample import Question, Sample
from keepkv.models.families import is_compressed, key_shape, layer_kinds
from keepkv.models.loading import DTYPES
from keepkv.recipe import Recipe
from keepkv.text.prompt import Prompt

LEAST = 64  # tokens of a passage: sentences are added until there are so many
MOST = 128  # tokens that a passage does not exceed, unless one sentence does
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


def require_bm25s() -> None:
    """Raises InputError without the package."""
    try:
        import bm25s  # noqa: F401
    except ImportError:
        raise InputError("bm25 needs the package bm25s, which is not installed: pip install 'keepkv[eval]'") from None


def split_into_passages(text: str, count: Callable[[str], int], budget: int) -> list[str]:
    """Consecutive whole sentences, together the whole text.

    A passage has 64 to 128 tokens, as it has in retrieval (DPR, arXiv 2004.04906, has 100 words): fewer hold little beside the
    words of the question, and of more only few fit into a small budget. Where the budget is less than four such passages, they
    are smaller, down to single sentences, so that the ranking still has something to choose.

    Args:
        text: The text.
        count: How many tokens a text has.
        budget: Tokens that may be read.
    """
    least, most = min(LEAST, budget // 4), min(MOST, budget // 2)
    passages: list[str] = []
    current, size = "", 0
    for sentence in filter(None, map(str.strip, _SENTENCE.split(text))):
        tokens = count(sentence)
        if current and (size >= least or size + tokens > most):
            passages.append(current)
            current, size = "", 0
        current, size = f"{current} {sentence}".strip(), size + tokens
    return [*passages, current] if current else passages


def best_passages(passages: Sequence[str], question: str, count: Callable[[str], int], budget: int) -> list[str]:
    """The passages of the best scores that fit into a budget together, in the text's order.

    One that does not fit is passed over. If none fits, there is no budget for retrieval: the beginning of the best one is read.

    Args:
        passages: All of them, in the text's order.
        question: The query.
        count: How many tokens a text has.
        budget: Tokens that may be read.
    """
    import bm25s

    words = bm25s.tokenize(list(passages), stopwords="en", show_progress=False, return_ids=False)
    query = bm25s.tokenize([question], stopwords="en", show_progress=False, return_ids=False)[0]
    index = bm25s.BM25(method="lucene")
    index.index(words, show_progress=False)
    scores = index.get_scores(query)
    order = sorted(range(len(passages)), key=lambda i: (-scores[i], i))
    taken: list[int] = []
    left = budget
    for i in order:
        tokens = count(passages[i])
        if tokens <= left:
            taken.append(i)
            left -= tokens
    if taken:
        return [passages[i] for i in sorted(taken)]
    beginning = passages[order[0]].split(" ")
    while len(beginning) > 1 and count(" ".join(beginning)) > budget:
        beginning.pop()
    return [" ".join(beginning)]


def full_bytes(setup: Setup, tokens: int) -> int:
    """Bytes of the full cache of so many tokens, in the dtype in which the run counts it."""
    heads, size = key_shape(setup.model)
    kinds = layer_kinds(setup.model)
    windows = (min(tokens, getattr(kind, "sliding_window", 1) - 1) for kind in kinds if not is_compressed(kind))
    held = tokens * sum(map(is_compressed, kinds)) + sum(windows)
    dtype = DTYPES.get(setup.config.full_dtype, setup.model.dtype)
    return 2 * held * heads * size * dtype.itemsize


def prepare_bm25(setup: Setup, sample: Sample) -> Measure:
    """For each question its passages are chosen, read with the full cache, and asked.

    The bytes are those of the passages alone: what the chat template puts before every text is not counted.
    """
    whole = Prompt(setup.tokenizer, sample.text)
    tokens = whole.text.shape[1]
    counts: dict[str, int] = {}

    def count(text: str) -> int:
        if text not in counts:
            counts[text] = setup.tokens(text).shape[1]
        return counts[text]

    def measure(recipe: Recipe) -> list[Outcome]:
        limit = Budget.parse(recipe.budget_text)
        per_token = full_bytes(setup, tokens) / tokens
        budget = int({"fraction": limit.amount * tokens, "count": limit.amount, "bytes": limit.amount / per_token}[limit.kind])
        passages = split_into_passages(sample.text, count, budget)
        return [_asked(setup, best_passages(passages, q.ask, count, budget), q, tokens, count) for q in sample.questions]

    return measure


def _asked(setup: Setup, passages: Sequence[str], question: Question, tokens: int, count: Callable[[str], int]) -> Outcome:
    """The answer to a question after some passages."""
    prompt = Prompt(setup.tokenizer, " ".join(passages))
    ids = prompt.text.to(setup.model.device)
    cache = KeepCache(setup.model, "100%", "full")
    start = time.perf_counter()
    setup.model(ids, past_key_values=cache, logits_to_keep=1)
    reading = CompressedReading(cache, ids, {"read": time.perf_counter() - start, "repeat": 0.0, "compress": 0.0})
    (outcome,) = asked(setup, reading, [prompt.question(question.ask)], [question])
    read = sum(map(count, passages))
    held = full_bytes(setup, read), full_bytes(setup, tokens)
    return replace(outcome, tokens=tokens, slots=float(read), kv_bytes=held)


RIVALS = (
    Rival(
        "bm25",
        "the passages that BM25 finds, as plain text",
        "BM25 by bm25s, arXiv 2407.03618",
        prepare_bm25,
        check=require_bm25s,
    ),
)
