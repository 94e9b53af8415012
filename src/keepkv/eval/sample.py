"""What a task gives (a text, and questions asked after it), and what a sample is made from (chance, prose, a length)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from keepkv.errors import InputError

Score = Callable[[str], float]


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Args:
        ask: The question.
        expected: The right answer in words.
        score: Scores an answer, from 0 to 1.
        wrong: Wrong answers to choose among.
        depth: Where in the text the answer stands, from 0 to 1, if it stands at one place.
        more: Further scores by name, of an answer that the model wrote.
    """

    ask: str
    expected: str
    score: Score
    wrong: tuple[str, ...] = ()
    depth: float | None = None
    more: Mapping[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A text and its questions.

    Args:
        text: What is read; "" if there are turns.
        questions: What is asked afterwards.
        turns: Instead of a text, a conversation: what the user said and what was answered, in order.
    """

    text: str
    questions: tuple[Question, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Prose:
    """A haystack.

    Args:
        sentences: Of real prose, in order; of several texts if they have `starts`, as `haystack.Haystack` has.
        count: How many tokens of the model a text has.
    """

    sentences: Sequence[str]
    count: Callable[[str], int]

    def stretch(self, rng: random.Random, tokens: int, number: int = 0) -> list[str]:
        """Consecutive sentences from a random start; after the last sentence comes the first. None is used twice.

        Of several texts, one is taken for each number, in an order that is always the same, and begun so early that it is long
        enough if it can be; behind its end comes the next text. As long as there are texts, no two numbers begin in one.

        Args:
            rng: Draws the start.
            tokens: About how many tokens.
            number: Of the sample.

        Raises:
            InputError: if the prose is shorter than that.
        """
        start = self._start(rng, tokens, number)
        total = 0
        sentences: list[str] = []
        for offset in range(len(self.sentences)):
            if total >= tokens and len(sentences) > 1:
                break
            sentence = self.sentences[(start + offset) % len(self.sentences)]
            sentences.append(sentence)
            total += self.count(sentence)
        if total < tokens:
            raise InputError(
                f"the haystack has about {total:,} tokens, fewer than the {tokens:,} wanted: give a longer text or a folder "
                "of texts with --haystack, or smaller --lengths"
            )
        if len(self._starts) > 1 and len(sentences) > 2 and total - tokens > self.count(sentences[-1]) / 2:
            sentences.pop()  # the nearer length; one text alone is cut as it always was
        return sentences

    @property
    def _starts(self) -> tuple[int, ...]:
        starts: tuple[int, ...] = getattr(self.sentences, "starts", (0,))
        return starts

    def _start(self, rng: random.Random, tokens: int, number: int) -> int:
        starts = self._starts
        if len(starts) == 1:
            return rng.randrange(len(self.sentences))
        text = random.Random(0).sample(range(len(starts)), len(starts))[number % len(starts)]
        first, end = (*starts, len(self.sentences))[text : text + 2]
        latest, total = end, 0
        while latest > first and total < tokens:
            latest -= 1
            total += self.count(self.sentences[latest])
        return rng.randrange(first, max(first, latest) + 1)


@dataclass(frozen=True)
class Draw:
    """What one sample is drawn from.

    Args:
        rng: The chance, seeded by run, task, length and number.
        prose: The haystack.
        tokens: About how many tokens the text should have.
        number: Which sample of its task and length it is.
    """

    rng: random.Random
    prose: Prose
    tokens: int
    number: int = 0

    def lines(self, *needles: str) -> list[str]:
        """Prose that leaves room for the needles."""
        return self.prose.stretch(self.rng, max(1, self.tokens - sum(map(self.prose.count, needles))), self.number)


def hide(rng: random.Random, lines: list[str], needles: Sequence[str]) -> tuple[str, list[float]]:
    """Puts needles at random places between the lines, never first or last.

    Returns:
        The text, and the depth of each needle from 0 to 1, in the order of the needles.
    """
    gaps = range(1, len(lines))
    places = rng.sample(gaps, len(needles)) if len(gaps) >= len(needles) else rng.choices(gaps or [1], k=len(needles))
    return put(lines, needles, places), [place / len(lines) for place in places]


def put(lines: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> str:
    """The text with each needle before the line whose number is its place."""
    text_lines = list(lines)
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: pair[0], reverse=True):
        text_lines.insert(place, needle)
    return joined(text_lines)


def spread(rng: random.Random, lines: Sequence[str], needles: Sequence[str]) -> tuple[str, list[float]]:
    """Puts needles between the lines, the first needle into the first part of the text, and so on.

    Returns:
        The text, and the depth of each needle from 0 to 1.
    """
    edges = [max(1, len(lines) * part // len(needles)) for part in range(len(needles) + 1)]
    places = [rng.randrange(lo, max(lo + 1, hi)) for lo, hi in pairwise(edges)]
    return put(lines, needles, places), [place / len(lines) for place in places]


def joined(lines: Sequence[str]) -> str:
    """Sentences with a space after each, blocks of code with what they end with."""
    return "".join(line if line.endswith("\n") else f"{line} " for line in lines).removesuffix(" ")
