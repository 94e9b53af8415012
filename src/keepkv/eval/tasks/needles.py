"""Needles in real prose: one or several keys, values of three kinds, several values of a key, several keys in one question.

After RULER (arXiv 2404.06654, section 3.1 and appendix B), whose haystack is replaced by prose, and whose question comes after
the compression.
"""

from __future__ import annotations

import random
import uuid
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise

from keepkv.eval.metrics import all_of, any_of
from keepkv.eval.sample import Draw, Question, Sample, hide, put
from keepkv.eval.tasks.task import RULER, Task

CITIES = ["Lisbon", "Oslo", "Quito", "Tunis", "Riga", "Hanoi", "Accra", "Lima", "Perth", "Sofia", "Kyoto", "Turin"]
NAMES = ["Anna", "Bruno", "Clara", "Diego", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Louis"]
TRADES = ["baker", "carpenter", "surgeon", "pilot", "lawyer", "painter", "teacher", "farmer", "plumber", "chemist"]
WORDS = ["harbor", "violin", "copper", "meadow", "lantern", "pepper", "castle", "ribbon", "anchor", "marble", "saddle"]
MANNERS = ["quiet", "golden", "hollow", "patient", "crooked", "gentle", "frozen", "humble", "sudden", "ancient", "bitter"]
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the one needle, one sample after the other


def value(rng: random.Random, kind: str) -> str:
    """A value of 7 digits, of two words, or a UUID."""
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    if kind == "words":
        return f"{rng.choice(MANNERS)}-{rng.choice(WORDS)}"
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def values(rng: random.Random, kind: str, count: int) -> list[str]:
    """So many different ones."""
    return list(islice(dict.fromkeys(value(rng, kind) for _ in range(50 * count)), count))


def _sentence(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def needles(draw: Draw, keys: int = 1, kind: str = "numbers") -> Sample:
    """niah_single (one key, at a depth of the grid), niah_multikey (at random depths; four of the keys asked, one by one)."""
    cities = draw.rng.sample(CITIES, keys)
    pool = values(draw.rng, kind, keys + 3)  # the last three are only wrong answers
    needle_sentences = [_sentence(kind, city, value) for city, value in zip(cities, pool, strict=False)]
    lines = draw.lines(*needle_sentences)
    if keys == 1:
        depths = [DEPTHS[draw.number % len(DEPTHS)]]
        text = put(lines, needle_sentences, [round(depths[0] * len(lines))])
    else:
        text, depths = hide(draw.rng, lines, needle_sentences)
    questions = []
    for i in sorted(draw.rng.sample(range(keys), min(keys, 4))):
        lead = f"The special magic {kind[:-1]} for {cities[i]} is"
        right = pool[i]
        wrong = tuple(f"{lead} {other}" for other in draw.rng.sample([other for other in pool if other != right], 3))
        ask = f"What is the special magic {kind[:-1]} for {cities[i]} mentioned in the text above? Answer with it alone."
        questions.append(Question(ask, f"{lead} {right}", any_of(right), wrong, depths[i]))
    return Sample(text, tuple(questions))


def multivalue(draw: Draw, count: int = 4) -> Sample:
    """niah_multivalue: one key has four values, and all are asked for."""
    city = draw.rng.choice(CITIES)
    pool = values(draw.rng, "numbers", count + 4)
    right, wrong = pool[:count], pool[count:]
    needle_sentences = [_sentence("numbers", city, value) for value in right]
    text, _ = hide(draw.rng, draw.lines(*needle_sentences), needle_sentences)
    ask = f"What are all the special magic numbers for {city} mentioned in the text above? There are {count}."
    return Sample(text, (Question(ask, ", ".join(right), all_of(*right), _swapped(right, wrong)),))


def multiquery(draw: Draw, count: int = 4) -> Sample:
    """niah_multiquery: four keys with a value each, all asked for in one question."""
    cities = draw.rng.sample(CITIES, count)
    pool = values(draw.rng, "numbers", count + 4)
    right, wrong = pool[:count], pool[count:]
    needle_sentences = [_sentence("numbers", city, value) for city, value in zip(cities, right, strict=True)]
    text, _ = hide(draw.rng, draw.lines(*needle_sentences), needle_sentences)
    enumeration = ", ".join(cities[:-1]) + f" and {cities[-1]}"
    ask = f"What are the special magic numbers for {enumeration} mentioned in the text above? Answer in this order."
    return Sample(text, (Question(ask, ", ".join(right), all_of(*right), _swapped(right, wrong)),))


def _swapped(right: list[str], wrong: list[str]) -> tuple[str, ...]:
    """The right answer with one, two and all of its parts exchanged for wrong ones."""
    return tuple(", ".join([*right[: len(right) - n], *wrong[:n]]) for n in (1, 2, len(right)))


KINDS: tuple[tuple[str, str, list[str]], ...] = (  # sentence, what is asked, what may stand for it
    ("The harbor master paints his boat in the color {}.", "the color of the harbor master's boat",
     ["turquoise", "crimson", "violet", "orange", "silver", "beige"]),
    ("The magic number of the lighthouse is {}.", "the magic number of the lighthouse", []),
    ("The name of the blacksmith's donkey is {}.", "the name of the blacksmith's donkey", NAMES),
    ("The inventor of the steam piano was born in {}.", "the place where the inventor of the steam piano was born", CITIES),
    ("The password of the night watchman is the word {}.", "the password of the night watchman", WORDS),
    ("The favorite dish of the circus director is {}.", "the favorite dish of the circus director",
     ["lentil soup", "roast duck", "apple pie", "fried trout", "onion bread", "plum cake"]),
    ("The beekeeper's twin brother works as a {}.", "the trade of the beekeeper's twin brother", TRADES),
    ("The old clock tower was finished in the year {}.", "the year in which the old clock tower was finished",
     [str(year) for year in range(1400, 1700)]),
)  # fmt: skip


def drawn_facts(rng: random.Random) -> list[tuple[str, Question]]:
    """Eight unlike facts in a random order: the sentence that says each, and its question."""
    facts = []
    for template, topic, pool in rng.sample(KINDS, len(KINDS)):
        right, *others = rng.sample(pool, 4) if pool else values(rng, "numbers", 4)
        sentence = template.format(right)
        wrong = tuple(template.format(other) for other in others)
        ask = f"What is {topic}, according to the text above?"
        facts.append((sentence, Question(ask, sentence, any_of(right), wrong)))
    return facts


def eight_facts(draw: Draw) -> Sample:
    """Eight unlike facts, one in each eighth of the text, each asked on its own: eight single needles at eight depths."""
    sentences, questions = zip(*drawn_facts(draw.rng), strict=True)
    lines = draw.lines(*sentences)
    edges = [max(1, len(lines) * part // len(sentences)) for part in range(len(sentences) + 1)]
    places = [draw.rng.randrange(lo, max(lo + 1, hi)) for lo, hi in pairwise(edges)]
    text = put(lines, sentences, places)
    placed = (replace(question, depth=place / len(lines)) for question, place in zip(questions, places, strict=True))
    return Sample(text, tuple(placed))


TASKS = (
    Task("needle", "one number in prose, at five depths", RULER, needles),
    Task("needle-words", "two words in prose, at five depths", RULER, partial(needles, kind="words")),
    Task("needle-uuids", "one UUID in prose, at five depths", RULER, partial(needles, kind="uuids")),
    Task("needles-4", "four numbers with a key each, asked one by one", RULER, partial(needles, keys=4)),
    Task("needles-8", "eight keys, four of them asked one by one", RULER, partial(needles, keys=8)),
    Task("needles-8-uuids", "the same with UUIDs", RULER, partial(needles, keys=8, kind="uuids")),
    Task("multi-value", "four numbers of one key, in one question", RULER, multivalue),
    Task("multi-query", "four keys in one question", RULER, multiquery),
    Task("facts", "eight unlike facts, one in each eighth of the text", "", eight_facts),
)
