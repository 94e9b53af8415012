"""Facts in prose: each has a plain question, and a paraphrased one that shares no content word with the sentence that says it.

Every task comes twice, with the plain questions and, as NAME-paraphrased, with the other ones: run both, and half of the
questions are paraphrased. Words alone do not find the answer of a paraphrased question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from keepkv.eval.metrics import all_named, first_named, named
from keepkv.eval.sample import Draw, Question, Sample, spread
from keepkv.eval.tasks.needles import CITIES, NAMES, TRADES, WORDS, values
from keepkv.eval.tasks.task import twice


class Fact(NamedTuple):
    """A fact with a gap.

    Attributes:
        says: The sentence, with {} for the value.
        plain: A question in its words.
        paraphrased: A question in other words.
        pool: The values; none: numbers of seven digits.
    """

    says: str
    plain: str
    paraphrased: str
    pool: Sequence[str]


ENGLISH = (
    Fact(
        "The harbor master paints his boat in the color {}.",
        "What is the color of the harbor master's boat",
        "Which shade does the man who runs the port prefer for his vessel",
        ["turquoise", "crimson", "violet", "orange", "silver", "beige"],
    ),
    Fact(
        "The magic number of the lighthouse is {}.",
        "What is the magic number of the lighthouse",
        "Which digits are said to be enchanted in the beacon on the coast",
        [],
    ),
    Fact(
        "The name of the blacksmith's donkey is {}.",
        "What is the name of the blacksmith's donkey",
        "What is the mule of the man who forges iron called",
        NAMES,
    ),
    Fact(
        "The inventor of the steam piano was born in {}.",
        "What is the place where the inventor of the steam piano was born",
        "Which city does the creator of the new musical instrument come from",
        CITIES,
    ),
    Fact(
        "The password of the night watchman is the word {}.",
        "What is the password of the night watchman",
        "Which secret term must be said to the guard after dark",
        WORDS,
    ),
    Fact(
        "The favorite dish of the circus director is {}.",
        "What is the favorite dish of the circus director",
        "Which meal does the head of the big top like best",
        ["lentil soup", "roast duck", "apple pie", "fried trout", "onion bread", "plum cake"],
    ),
    Fact(
        "The beekeeper's twin brother works as a {}.",
        "What is the trade of the beekeeper's twin brother",
        "What job does the sibling of the man with the hives have",
        TRADES,
    ),
    Fact(
        "The old clock tower was finished in the year {}.",
        "What is the year in which the old clock tower was finished",
        "When did people complete the ancient building that shows the time",
        [str(year) for year in range(1400, 1700)],
    ),
)
EASY = (
    Fact(
        "The doctor's baby is called {}.",
        "What is the doctor's baby called",
        "What is the name of the physician's infant",
        NAMES,
    ),
    Fact(
        "The sailors' favorite dish is {}.",
        "What is the favorite dish of the sailors",
        "Which food do seamen like best",
        ["lentil soup", "roast duck", "apple pie", "fried trout", "onion bread", "plum cake"],
    ),
    Fact(
        "The old church was built in {}.",
        "When was the old church built",
        "In which year did they construct the ancient chapel",
        [str(year) for year in range(1400, 1700)],
    ),
    Fact(
        "The teacher moved to {}.",
        "Where did the teacher move to",
        "In which city does the instructor live",
        CITIES,
    ),
    Fact(
        "The thief stole a {}.",
        "What did the thief steal",
        "What did the robber take",
        ["violin", "lantern", "saddle", "necklace", "carpet", "telescope"],
    ),
    Fact(
        "The movie lasts {} minutes.",
        "How many minutes does the movie last",
        "How long is the film",
        [str(minutes) for minutes in range(61, 240)],
    ),
    Fact(
        "The gardener's son became a {}.",
        "What did the gardener's son become",
        "Which profession does the boy of the landscaper have",
        TRADES,
    ),
    Fact(
        "The spy's password is {}.",
        "What is the spy's password",
        "Which code word does the secret agent use",
        WORDS,
    ),
)
ABOVE = ", according to the text above?"
CORRECTED = ", according to the correction?"
LATEST = ", according to the latest information?"

ANIMALS = ["goat", "parrot", "turtle", "rabbit", "donkey", "falcon", "lizard", "hamster", "pigeon", "ferret", "peacock",
           "otter", "spider", "rooster", "hedgehog", "llama", "monkey", "swan", "badger", "camel"]  # fmt: skip


def drawn(draw: Draw, facts: Sequence[Fact] = ENGLISH, paraphrased: bool = False, ending: str = ABOVE) -> list[Question]:
    """The questions on unlike facts, in a random order; what each `expected` says is the sentence of the text."""
    questions = []
    for fact in draw.rng.sample(facts, len(facts)):
        right, *others = draw.rng.sample(fact.pool, 4) if fact.pool else values(draw.rng, "numbers", 4)
        ask = (fact.paraphrased if paraphrased else fact.plain) + ending
        wrong = tuple(fact.says.format(other) for other in others)
        questions.append(Question(ask, fact.says.format(right), named(right), wrong))
    return questions


def each_asked(draw: Draw, facts: Sequence[Fact] = ENGLISH, paraphrased: bool = False, ending: str = ABOVE) -> Sample:
    """Unlike facts, one in each part of the text, each asked on its own: eight single needles at eight depths."""
    questions = drawn(draw, facts, paraphrased, ending)
    sentences = [question.expected for question in questions]
    text, depths = spread(draw.rng, draw.lines(*sentences), sentences)
    return Sample(text, tuple(replace(question, depth=at) for question, at in zip(questions, depths, strict=True)))


def ten(draw: Draw, paraphrased: bool = False) -> Sample:
    """Ten people keep an animal each, and all ten animals are asked for in one question."""
    right = draw.rng.sample(ANIMALS, len(TRADES))
    other = [animal for animal in ANIMALS if animal not in right]
    people = draw.rng.sample(TRADES, len(TRADES))
    sentences = [f"The {who} keeps a pet {what}." for who, what in zip(people, right, strict=True)]
    text, _ = spread(draw.rng, draw.lines(*sentences), sentences)
    ask = "Which creatures do people own" if paraphrased else "Which pets do people keep"
    ask += f"{ABOVE} There are {len(right)}. Answer with a list of them."
    wrong = tuple(", ".join([*right[: len(right) - n], *other[:n]]) for n in (2, 5, len(right)))
    return Sample(text, (Question(ask, ", ".join(right), all_named(*right), wrong),))


def corrected(draw: Draw, paraphrased: bool = False, count: int = 4) -> Sample:
    """Facts are said in the first half of the text and said anew, with another value, in the second: the new one is right.

    more: old, whether the old value was given instead, that is, named first.
    """
    sentences, corrections, questions = [], [], []
    for fact in draw.rng.sample(EASY, count):
        old, new, *others = draw.rng.sample(fact.pool, 4) if fact.pool else values(draw.rng, "numbers", 4)
        sentences.append(fact.says.format(old))
        says_new = fact.says.format(new)
        corrections.append(f"Correction: {says_new[0].lower()}{says_new[1:-1]}, not {old}.")
        wrong = tuple(fact.says.format(value) for value in (old, *others))
        ask = fact.paraphrased + LATEST if paraphrased else fact.plain + CORRECTED
        more = {"old": first_named(old, new)}
        questions.append(Question(ask, says_new, first_named(new, old), wrong, more=more))
    sentences += corrections
    text, depths = spread(draw.rng, draw.lines(*sentences), sentences)
    return Sample(text, tuple(replace(question, depth=at) for question, at in zip(questions, depths[count:], strict=True)))


TASKS = (
    *twice("facts", "eight unlike facts, one in each eighth of the text", each_asked),
    *twice("easy-facts", "eight facts in everyday words, one in each eighth", partial(each_asked, facts=EASY, ending="?")),
    *twice("ten-facts", "ten facts in one answer", ten),
    *twice("corrected", "four facts that are said anew: the new version is right", corrected),
)
