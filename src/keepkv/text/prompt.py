"""Prompt: a text and questions about it, as tokens in the model's chat format."""

from __future__ import annotations

import math
import re
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import regex
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keepkv.errors import InputError

_MOST_COPIES = 10**6  # of a part of a regular expression
_PATIENCE = 5.0  # seconds that a regular expression may take
NEXT_QUESTION = "\nQuestion:"  # what stands before a question where there is no chat template


class Prompt:
    """A text and questions about it as tokens: `text` is read once, and `question(q)` is appended to it.

    Text and question are the user's one message, two line breaks apart. What is read ends between the line breaks: most
    tokenizers cut there too where they see the whole message.

    Attributes:
        text: Token ids [1, T] of everything before a question.
        lead: How many of them the chat template puts before the text.
        before, after: What stands around a question.

    Raises:
        InputError: for a chat template that does not show the user's message as it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self._tokenizer = tokenizer
        self._special = not tokenizer.chat_template  # whether the tokenizer adds its special tokens: templates have their own
        if tokenizer.chat_template:
            mark, other = marks(2, text, str(tokenizer.chat_template))
            body = f"{text.strip()}\n\n"
            try:
                opening, _, self.after = _around(tokenizer, body, mark)
                if [opening, "whale", self.after] != _around(tokenizer, "whale", other):
                    raise ValueError("what stands around it depends on it")
            except ValueError as error:
                raise InputError(f"this model's chat template does not show the user's message: {error}") from error
            body = body.removesuffix("\n")
            self.before = "\n"
        else:
            opening = ""
            body = f"{text.strip()}\n"
            self.before = f"{NEXT_QUESTION} "
            self.after = "\nAnswer:"
        self._text = opening + body
        self.text: Tensor = self._tokenize(self._text)
        self.lead = same_prefix(self._tokenize(opening)[0].tolist(), self.text[0].tolist())

    def _tokenize(self, text: str) -> Tensor:
        ids: Tensor = self._tokenizer(text, add_special_tokens=self._special, return_tensors="pt", verbose=False)["input_ids"]
        return ids.long()

    def spans(self, *patterns: str) -> list[tuple[int, int]]:
        """The tokens (first, last + 1) of every match of regular expressions in what is read.

        Raises:
            InputError: for a pattern that is no regular expression or matches nothing, and for a tokenizer that cannot say
                where its tokens stand in the text.
        """
        matches = [match for pattern in patterns for match in self._matches(pattern)]
        if not matches:
            return []
        if not self._tokenizer.is_fast:
            raise InputError(
                "this model's tokenizer does not say where its tokens stand in the text: nothing can be kept by name"
            )
        encoding = self._tokenizer(self._text, add_special_tokens=self._special, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in encoding["offset_mapping"]]  # starts and ends ascend
        ends = [end for _, end in encoding["offset_mapping"]]
        spans = [(bisect_right(ends, first), bisect_left(starts, last)) for first, last in matches]
        return [(first, last) for first, last in spans if first < last]

    def _matches(self, pattern: str) -> list[tuple[int, int]]:
        """The characters (first, last + 1) of a pattern's matches. Raises InputError."""
        counts = [int(count[-20:]) for count in re.findall(r"[{,]\s*(\d+)\s*}", pattern)]
        if math.prod(counts) > _MOST_COPIES:  # counted repetitions are written out, those within others again and again
            raise InputError(f"{pattern!r} counts more than {_MOST_COPIES:,} repetitions: write it with * or +")
        try:
            with warnings.catch_warnings():  # re's about what may mean something else one day
                warnings.simplefilter("ignore")
                re.compile(pattern)  # what Python knows: regex has more, such as recursion
                found = regex.finditer(pattern, self._text, timeout=_PATIENCE)
            matches = [match.span() for match in found if match[0]]
        except (re.error, regex.error, OverflowError, RecursionError, MemoryError) as error:
            raise InputError(f"{pattern!r} is not a regular expression: {error}") from None
        except TimeoutError:
            raise InputError(
                f"{pattern!r} takes more than {_PATIENCE:.0f} seconds to look for here: write it without repetitions of "
                "repetitions, such as (a+)+"
            ) from None
        if not matches:
            raise InputError(f"nothing in the text matches {pattern!r}, so there is nothing to keep")
        return matches

    def question(self, question: str) -> Tensor:
        """Token ids [1, n] of a question and what stands around it."""
        return question_ids(self._tokenizer, question, self.before, self.after)


def question_ids(tokenizer: PreTrainedTokenizerBase, question: str, before: str, after: str) -> Tensor:
    """Token ids [1, n] of a question and what stands around it."""
    ids: Tensor = tokenizer(before + question.strip() + after, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return ids


def _around(tokenizer: PreTrainedTokenizerBase, body: str, mark: str) -> list[str]:
    """What stands before a message, the message between two marks, and what stands behind. Raises ValueError as `shown`."""
    content = f"{mark}{body}{mark}"
    return shown(tokenizer, [{"role": "user", "content": content}], {content: 1, mark: 2}).split(mark)


def shown(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], counts: Mapping[str, int]) -> str:
    """What a chat template makes of a conversation, up to where the model answers.

    Templates that want the content of a message as a list of parts get it so.

    Args:
        tokenizer: Has a chat template.
        messages: Each with a role and a content.
        counts: How often texts must be in it, so that nothing that was said is changed, dropped or doubled.

    Raises:
        ValueError: for a template that takes no such conversation, or does not show these texts so often.
    """
    as_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    forms: tuple[list[Any], ...] = (list(messages), as_parts)
    failure = ""
    for form in forms:
        try:
            whole = str(tokenizer.apply_chat_template(form, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # templates raise whatever they like
            failure = failure or f"it fails ({type(error).__name__}: {error})"
            continue
        written_out = form is as_parts and any(part in whole for part in ("'type': 'text'", '"type": "text"'))
        if not written_out and all(whole.count(text) == number for text, number in counts.items()):
            return whole
        failure = "it does not show every message once, as it is"
    raise ValueError(failure)


def marks(number: int, *texts: str) -> list[str]:
    """Different strings that occur in none of the texts: they mark places in what a chat template makes of a message.

    A mark begins with a sign that it holds nowhere else, so it cannot occur across a text's edge either.
    """
    candidates = (f"\u2402keepkv-{index}\u2403" for index in count())
    free = (mark for mark in candidates if not any(mark in text for text in texts))
    return [next(free) for _ in range(number)]


def same_prefix(one: list[int], other: list[int]) -> int:
    """How many tokens two lists have in common before they differ."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
