"""Tasks with checkable answers: a text, questions asked only after it was compressed, and a score in [0, 1] for each.

Every task is a function (random.Random, haystack, size) -> Sample, seeded and of about `size` words. The haystack is
real prose, a list of sentences; `questions.articles` reads SQuAD-format paragraphs.
"""

from __future__ import annotations

import json
import random
import re
import string
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice, pairwise
from pathlib import Path


@dataclass(frozen=True)
class Question:
    """What is asked, the right answer in words, the score of an answer in [0, 1], and wrong answers to choose among."""

    ask: str
    expected: str
    score: Callable[[str], float]
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    text: str
    questions: tuple[Question, ...]


CITIES = ["Lisbon", "Oslo", "Quito", "Tunis", "Riga", "Hanoi", "Accra", "Lima", "Perth", "Sofia", "Kyoto", "Turin"]
NAMES = ["Anna", "Bruno", "Clara", "Diego", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Louis"]
TRADES = ["baker", "carpenter", "surgeon", "pilot", "lawyer", "painter", "teacher", "farmer", "plumber", "chemist"]
WORDS = ["harbor", "violin", "copper", "meadow", "lantern", "pepper", "castle", "ribbon", "anchor", "marble", "saddle"]


def sentences(text: str) -> list[str]:
    """A haystack: the sentences of a text, in order."""
    flat = re.sub(r"\s+", " ", text)
    return [part for part in re.split(r"(?<=[.!?]) ", flat) if 20 < len(part) < 600]


def _stretch(rng: random.Random, haystack: list[str], words: int) -> list[str]:
    """Consecutive sentences of about so many words, from a random start."""
    start, out, count = rng.randrange(len(haystack)), [], 0
    for sentence in islice(cycle(haystack), start, None):
        out.append(sentence)
        count += len(sentence.split())
        if count >= words:
            return out
    raise AssertionError


def _hide(rng: random.Random, lines: list[str], needles: list[str]) -> str:
    """The needles at random places between the sentences, never the very first or last."""
    lines = list(lines)
    for needle in needles:
        lines.insert(rng.randrange(1, len(lines)), needle)
    return " ".join(lines)


def _contains(*answers: str) -> Callable[[str], float]:
    def score(answer: str) -> float:
        return float(any(_plain(right) in _plain(answer) for right in answers))

    return score


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[,.'\"“”]", "", text.lower())).strip()


def _needles(rng: random.Random, haystack: list[str], words: int, count: int) -> Sample:
    cities = rng.sample(CITIES, count)
    numbers = [str(rng.randrange(10**6, 10**7)) for _ in cities]
    lines = [f"One of the special magic numbers for {c} is: {n}." for c, n in zip(cities, numbers, strict=True)]
    others = [*numbers, *(str(rng.randrange(10**6, 10**7)) for _ in range(4 - count))]
    questions = [
        Question(
            f"What is the special magic number for {city} mentioned in the text above? Answer with the number.",
            f"The special magic number for {city} is {number}", _contains(number),
            tuple(f"The special magic number for {city} is {other}" for other in others if other != number),
        )
        for city, number in zip(cities, numbers, strict=True)
    ]  # fmt: skip
    return Sample(_hide(rng, _stretch(rng, haystack, words), lines), tuple(questions))


def needle(rng: random.Random, haystack: list[str], words: int) -> Sample:
    """One number hidden in prose (RULER, niah_single)."""
    return _needles(rng, haystack, words, 1)


def needles(rng: random.Random, haystack: list[str], words: int) -> Sample:
    """Four keys hidden, each asked on its own (RULER, niah_multikey)."""
    return _needles(rng, haystack, words, 4)


KINDS: tuple[tuple[str, str, list[str]], ...] = (  # sentence, question, what may stand for it
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


def facts(rng: random.Random, haystack: list[str], words: int) -> Sample:
    """Eight unlike facts, one in each eighth of the text, each asked on its own: eight single needles at eight depths."""
    lines = _stretch(rng, haystack, words)
    questions = []
    kinds = rng.sample(KINDS, len(KINDS))
    for depth in range(len(kinds) - 1, -1, -1):  # from the end, so that places stay
        sentence, what, pool = kinds[depth]
        said, *others = rng.sample(pool, 4) if pool else [str(rng.randrange(10**6, 10**7)) for _ in range(4)]
        lo, hi = (max(1, len(lines) * (depth + turn) // len(kinds)) for turn in (0, 1))
        lines.insert(rng.randrange(lo, hi), sentence.format(said))
        wrong = tuple(sentence.format(other) for other in others)
        ask = f"What is {what}, according to the text above?"
        questions.append(Question(ask, sentence.format(said), _contains(said), wrong))
    return Sample(" ".join(lines), tuple(reversed(questions)))


def pairs(rng: random.Random, haystack: list[str], words: int) -> Sample:
    """UUID keys and values in one JSON object; four values asked (key-value retrieval)."""
    table = [(_uuid(rng), _uuid(rng)) for _ in range(max(4, words // 150))]
    body = ",\n".join(f' "{key}": "{value}"' for key, value in table)
    asked = rng.sample(table, 4)
    questions = [
        Question(
            f'What is the value of the key "{key}"?', f'"{value}"', _contains(value),
            tuple(f'"{other}"' for _, other in asked if other != value),
        )
        for key, value in asked
    ]  # fmt: skip
    return Sample(f"JSON data:\n{{{body}}}", tuple(questions))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def common(rng: random.Random, haystack: list[str], words: int) -> Sample:
    """A list in which four words come often and the others once (RULER, common words)."""
    often = rng.sample(WORDS, 4)
    rare = sorted({w for line in haystack for w in re.findall(r"[a-z]{4,9}", line)} - set(WORDS))
    count = max(40, words // 2)
    listed = rng.sample(rare, min(len(rare), count - 4 * (count // 12))) + often * (count // 12)
    rng.shuffle(listed)
    text = "A list of words:\n" + " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))

    def score(answer: str) -> float:
        return sum(word in answer.lower() for word in often) / len(often)

    ask = "Which four words appear most often in the list above? Answer with the four words."
    less = rng.sample(sorted(set(listed) - set(often)), 6)
    wrong = tuple(", ".join([*often[: 4 - swapped], *less[:swapped]]) for swapped in (1, 2, 4))
    return Sample(text, (Question(ask, ", ".join(often), score, wrong),))


def variables(rng: random.Random, haystack: list[str], words: int) -> Sample:
    """Assignments hidden in prose; which variables hold a value (RULER, variable tracking, two hops)."""
    names = ["".join(rng.choices(string.ascii_uppercase, k=4)) for _ in range(3)]
    value = str(rng.randrange(10**4, 10**5))
    chain = [f"VAR {names[0]} = {value}."] + [f"VAR {new} = VAR {old}." for old, new in pairwise(names)]
    lines = _stretch(rng, haystack, words)
    places = sorted(rng.sample(range(1, len(lines)), len(chain)), reverse=True)
    for place, line in zip(places, reversed(chain), strict=True):
        lines.insert(place, line)

    def score(answer: str) -> float:
        return sum(name in answer for name in names) / len(names)

    ask = f"Find all variables that are assigned the value {value} in the text above. Answer with their names."
    strange = ["".join(rng.choices(string.ascii_uppercase, k=4)) for _ in range(3)]
    wrong = tuple(", ".join([*names[: 3 - swapped], *strange[:swapped]]) for swapped in (1, 2, 3))
    return Sample(" ".join(lines), (Question(ask, ", ".join(names), score, wrong),))


def record(rng: random.Random, haystack: list[str], words: int) -> Sample:
    """A person described in prose; a JSON object asked, scored field by field."""
    who, town, trade, year = rng.choice(NAMES), rng.choice(CITIES), rng.choice(TRADES), str(rng.randrange(1900, 2000))
    fact = f"Let it be noted here that {who}, a {trade} from {town}, was born in the year {year}."
    fields = {"name": who, "job": trade, "town": town, "born": year}

    def score(answer: str) -> float:
        found = re.search(r"\{.*?\}", answer, re.DOTALL)
        try:
            got = json.loads(found[0]) if found else {}
        except json.JSONDecodeError:
            got = {}
        return sum(_plain(str(got.get(key, ""))) == _plain(value) for key, value in fields.items()) / len(fields)

    ask = (
        f"The text above mentions {who}. Write down what it says about {who} as a JSON object with exactly "
        'the keys "name", "job", "town" and "born". '
        'For example: {"name": "Rosa", "job": "clerk", "town": "Bonn", "born": "1950"}'
    )
    swaps: tuple[tuple[str, list[str]], ...] = (
        ("job", TRADES),
        ("town", CITIES),
        ("born", [str(y) for y in range(1900, 2000)]),
    )
    wrong = tuple(json.dumps({**fields, key: rng.choice([x for x in pool if x != fields[key]])}) for key, pool in swaps)
    return Sample(_hide(rng, _stretch(rng, haystack, words), [fact]), (Question(ask, json.dumps(fields), score, wrong),))


def instructions(rng: random.Random, haystack: list[str], words: int) -> Sample:
    """Three instructions at the head of a text, all to be obeyed in an answer asked for after it."""
    start, end, word = rng.choice(NAMES), rng.choice(CITIES), rng.choice(WORDS)
    rules = (
        f'Rules for every answer: 1. Begin the answer with "{start}:". '
        f'2. Use the word "{word}". 3. End the answer with "{end}".'
    )

    def score(answer: str) -> float:
        plain = answer.strip().strip("\"'.")
        return (plain.startswith(f"{start}:") + (word in plain.lower()) + plain.endswith(end)) / 3

    text = f"{rules}\n\n{' '.join(_stretch(rng, haystack, words))}"
    ask = "Obey the rules given at the beginning and write one short sentence about the text."
    other = [rng.choice([x for x in pool if x != taken]) for pool, taken in ((NAMES, start), (WORDS, word), (CITIES, end))]
    wrong = (
        f"{other[0]}: The text is about a {word}. {end}", f"{start}: The text is about a {other[1]}. {end}",
        f"{start}: The text is about a {word}. {other[2]}",
    )  # fmt: skip
    return Sample(text, (Question(ask, f"{start}: The text is about a {word}. {end}", score, wrong),))


def articles(file: Path) -> Iterator[tuple[str, list[Question]]]:
    """Paragraphs and their questions of a SQuAD-format file."""
    for article in json.loads(file.read_text())["data"]:
        for paragraph in article["paragraphs"]:
            asked = [
                Question(qa["question"], qa["answers"][0]["text"], _contains(*(a["text"] for a in qa["answers"])))
                for qa in paragraph["qas"]
            ]
            yield paragraph["context"], asked


def passages(rng: random.Random, paragraphs: list[tuple[str, list[Question]]], words: int) -> Sample:
    """Consecutive paragraphs and questions about some of them (SQuAD)."""
    start, chosen, count = rng.randrange(len(paragraphs)), [], 0
    for paragraph in islice(cycle(paragraphs), start, None):
        chosen.append(paragraph)
        count += len(paragraph[0].split())
        if count >= words:
            break
    questions = [question for _, asked in chosen for question in asked]
    answers = sorted({question.expected for question in questions})
    drawn = []
    for question in rng.sample(questions, min(6, len(questions))):
        others = [answer for answer in answers if not question.score(answer)]
        drawn.append(replace(question, wrong=tuple(rng.sample(others, min(3, len(others))))))
    return Sample("\n\n".join(text for text, _ in chosen), tuple(drawn))


TASKS: dict[str, Callable[[random.Random, list[str], int], Sample]] = {
    task.__name__: task for task in (needle, needles, facts, pairs, common, variables, record, instructions)
}
