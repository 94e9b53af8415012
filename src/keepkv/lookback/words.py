"""Ranking a text's spans by the question's words: BM25."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keepkv.errors import InputError
from keepkv.lookback.spans import NEAR, tiles

MARGIN = 4  # tokens on either side that are read with a span, so that words at its ends are whole


@dataclass(frozen=True)
class Words:
    """The words of a text's spans, to be ranked by BM25 (bm25s, arXiv 2407.03618).

    Attributes:
        spans: How many there are.
        index: The index of bm25s.
    """

    spans: int
    index: Any

    @staticmethod
    def available() -> bool:
        """Whether the package bm25s is installed."""
        return find_spec("bm25s") is not None

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> Words:
        """The words of a text, ids [1, T].

        Raises:
            InputError: without the package bm25s.
        """
        bm25s = _bm25s()
        tokens = ids[0].tolist()
        texts = [
            str(tokenizer.decode(tokens[max(0, first - MARGIN) : last + MARGIN], skip_special_tokens=True))
            for first, last in tiles(len(tokens))
        ]
        index = bm25s.BM25(method="lucene")
        index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False, return_ids=False), show_progress=False)
        return Words(len(texts), index)

    def ranked(self, question: str, least: float = NEAR) -> list[int]:
        """Numbers of the spans that share words with the question, stop words aside, the best first.

        Args:
            question: In words.
            least: The least share of the best span's score.
        """
        query = _bm25s().tokenize([question], stopwords="en", show_progress=False, return_ids=False)[0]
        scores = self.index.get_scores(query).tolist() if query else [0.0] * self.spans
        limit = least * max(scores)
        return sorted((i for i in range(self.spans) if scores[i] > 0 and scores[i] >= limit), key=lambda i: (-scores[i], i))


def _bm25s() -> Any:
    """The package. Raises InputError."""
    try:
        import bm25s
    except ImportError:
        raise InputError(
            "looking back ranks by words, too, and needs the package bm25s, which is not installed: pip install 'keepkv[eval]'"
        ) from None
    return bm25s
