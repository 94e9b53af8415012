"""Needles in real prose: one or several keys, values of three kinds, several values of a key, several keys in one question.

After RULER (arXiv 2404.06654, section 3.1 and appendix B), whose haystack is replaced by prose, and whose question comes after
the compression.
"""

from __future__ import annotations

import random
import uuid
from functools import partial
from itertools import islice

from keepkv.eval.metrics import all_of, any_of
from keepkv.eval.sample import Draw, Question, Sample, hide, put
from keepkv.eval.tasks.task import RULER, Task, twice

CITIES = ["Lisbon", "Oslo", "Quito", "Tunis", "Riga", "Hanoi", "Accra", "Lima", "Perth", "Sofia", "Kyoto", "Turin"]
NAMES = ["Anna", "Bruno", "Clara", "Diego", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Louis"]
TRADES = ["baker", "carpenter", "surgeon", "pilot", "lawyer", "painter", "teacher", "farmer", "plumber", "chemist"]
WORDS = ["harbor", "violin", "copper", "meadow", "lantern", "pepper", "castle", "ribbon", "anchor", "marble", "saddle"]
PARAPHRASES = {
    "Lisbon": "the capital of Portugal", "Oslo": "the capital of Norway", "Quito": "the capital of Ecuador",
    "Tunis": "the city near Carthage", "Riga": "the capital of Latvia", "Hanoi": "the capital of Vietnam",
    "Accra": "the capital of Ghana", "Lima": "the capital of Peru", "Perth": "the largest city of Western Australia",
    "Sofia": "the capital of Bulgaria", "Kyoto": "the old capital of Japan", "Turin": "the capital of Piedmont",
}  # fmt: skip
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


def needles(draw: Draw, keys: int = 1, kind: str = "numbers", paraphrased: bool = False) -> Sample:
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
        if paraphrased:
            ask = f"What is the secret code of {PARAPHRASES[cities[i]]}, according to the text above?"
        questions.append(Question(ask, f"{lead} {right}", any_of(right), wrong, depths[i]))
    return Sample(text, tuple(questions))


def multivalue(draw: Draw, paraphrased: bool = False, count: int = 4) -> Sample:
    """niah_multivalue: one key has four values, and all are asked for."""
    city = draw.rng.choice(CITIES)
    pool = values(draw.rng, "numbers", count + 4)
    right, wrong = pool[:count], pool[count:]
    needle_sentences = [_sentence("numbers", city, value) for value in right]
    text, _ = hide(draw.rng, draw.lines(*needle_sentences), needle_sentences)
    ask = f"What are all the special magic numbers for {city} mentioned in the text above? There are {count}."
    if paraphrased:
        ask = f"Which extraordinary digits does the text above give for {PARAPHRASES[city]}? There are {count} entries."
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


def _one(name: str, summary: str, kind: str) -> tuple[Task, Task]:
    """Both forms of a task with one key: with several keys, small models cannot tell which one a paraphrase means."""
    return twice(name, summary, partial(needles, kind=kind), source=RULER)


TASKS = (
    *_one("needle", "one number in prose, at five depths", "numbers"),
    *_one("needle-words", "two words in prose, at five depths", "words"),
    *_one("needle-uuids", "one UUID in prose, at five depths", "uuids"),
    Task("needles-4", "four numbers with a key each, asked one by one", RULER, partial(needles, keys=4)),
    Task("needles-8", "eight keys, four of them asked one by one", RULER, partial(needles, keys=8)),
    Task("needles-8-uuids", "the same with UUIDs", RULER, partial(needles, keys=8, kind="uuids")),
    *twice("multi-value", "four numbers of one key, in one question", multivalue, source=RULER),
    Task("multi-query", "four keys in one question", RULER, multiquery),
)
