"""Prompt: a text and questions about it, cut into tokens with the model's chat template."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from itertools import takewhile

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keepkv.errors import InputError

_MARK = "\u2402keepkv\u2403"  # stands before the text and where the question will be, while the chat template is applied


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
