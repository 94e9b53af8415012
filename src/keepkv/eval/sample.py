"""What a task gives (a text, and questions asked after it was read), and what it is made from (chance, prose, a length)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from keepkv.errors import InputError

Score = Callable[[str], float]


@dataclass(frozen=True)
class Question:
    """What is asked, the right answer in words, the score of an answer in [0, 1], and wrong answers to choose among.

    depth: where in the text the answer stands, from 0 to 1, if it stands at one place. more: further scores of an answer that
    was written, by name: parts of `score`, or other people's measures.
    """

    ask: str
    expected: str
    score: Score
    wrong: tuple[str, ...] = ()
    depth: float | None = None
    more: Mapping[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A text and its questions. turns: instead of a text, what a user said and what was answered, in order."""

    text: str
    questions: tuple[Question, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Prose:
    """A haystack: the sentences of real prose, in order, and how many tokens of the model each of them is."""

    sentences: Sequence[str]
    count: Callable[[str], int]

    def stretch(self, rng: random.Random, tokens: int) -> list[str]:
        """Consecutive sentences of about so many tokens, from a random start; from the end it goes on at the beginning, once.

        Raises InputError if the prose is shorter than that: nothing is ever repeated to fill a text.
        """
        start, have = rng.randrange(len(self.sentences)), 0
        out: list[str] = []
        for place in range(len(self.sentences)):
            if have >= tokens and len(out) > 1:
                break
            out.append(self.sentences[(start + place) % len(self.sentences)])
            have += self.count(out[-1])
        if have < tokens:
            raise InputError(
                f"the haystack has about {have:,} tokens, fewer than the {tokens:,} wanted: give a longer text, or a folder "
                "of texts, with --haystack, or a smaller --lengths"
            )
        return out


@dataclass(frozen=True)
class Draw:
    """What one sample is drawn from. number: which sample of its task and length it is."""

    rng: random.Random
    prose: Prose
    tokens: int
    number: int = 0

    def lines(self, *needles: str) -> list[str]:
        """Prose that leaves room for the needles."""
        return self.prose.stretch(self.rng, max(1, self.tokens - sum(map(self.prose.count, needles))))


def hide(rng: random.Random, lines: list[str], needles: Sequence[str]) -> tuple[str, list[float]]:
    """The needles in order of drawing, at random places between the lines, never first or last; the text, and their depths."""
    gaps = range(1, len(lines))
    places = rng.sample(gaps, len(needles)) if len(gaps) >= len(needles) else rng.choices(gaps or [1], k=len(needles))
    return put(lines, needles, places), [place / len(lines) for place in places]


def put(lines: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> str:
    """The text with each needle before the line whose number is its place."""
    out = list(lines)
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: pair[0], reverse=True):
        out.insert(place, needle)
    return " ".join(out)
