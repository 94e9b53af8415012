"""Tasks on what must be tracked, counted or extracted: key-value pairs, variables, frequent words, a record, instructions."""

from __future__ import annotations

import json
import re
import string
from itertools import accumulate, pairwise

from keepkv.eval import measure
from keepkv.eval.metrics import all_of, any_of, fields
from keepkv.eval.sample import Draw, Question, Sample, hide, put
from keepkv.eval.tasks.needles import CITIES, NAMES, TRADES, WORDS, drawn_facts, value
from keepkv.eval.tasks.task import RULER, Task


def pairs(draw: Draw) -> Sample:
    """UUID keys and values in one JSON object; four values asked (key-value retrieval, arXiv 2307.03172, section 3)."""
    table: list[tuple[str, str]] = []
    have = 0
    while len(table) < 4 or have < draw.tokens:
        table.append((value(draw.rng, "uuids"), value(draw.rng, "uuids")))
        have += draw.prose.count(_line(*table[-1]))
    return among_pairs(draw, table, sorted(draw.rng.sample(range(len(table)), 4)))


def among_pairs(draw: Draw, table: list[tuple[str, str]], asked: list[int]) -> Sample:
    """The object, and a question for each of the pairs that are asked; the wrong answers are other pairs' values."""
    body = ",\n".join(_line(*pair) for pair in table)
    questions = []
    for i in asked:
        key, right = table[i]
        wrong = draw.rng.sample([other for _, other in table if other != right], 3)
        ask = f'What is the value of the key "{key}"? Answer with the value.'
        depth = i / max(1, len(table) - 1)
        questions.append(Question(ask, f'"{right}"', any_of(right), tuple(f'"{other}"' for other in wrong), depth))
    return Sample(f"JSON data:\n{{{body}}}", tuple(questions))


def _line(key: str, right: str) -> str:
    return f' "{key}": "{right}"'


def variables(draw: Draw, hops: int = 4) -> Sample:
    """One chain of assignments hidden in prose; which variables hold the value (RULER, variable tracking, four hops)."""
    fresh = list(dict.fromkeys("".join(draw.rng.choices(string.ascii_uppercase, k=5)) for _ in range(4 * hops)))
    names, strange = fresh[: hops + 1], fresh[hops + 1 : 2 * hops + 2]
    number = str(draw.rng.randrange(10**4, 10**5))
    chain = [f"VAR {names[0]} = {number}."] + [f"VAR {new} = VAR {old}." for old, new in pairwise(names)]
    lines = draw.lines(*chain)
    gaps = range(1, len(lines) + 1)
    places = sorted(draw.rng.sample(gaps, len(chain)) if len(gaps) >= len(chain) else draw.rng.choices(gaps, k=len(chain)))
    ask = f"Find all variables that are assigned the value {number} in the text above. Answer with their names."
    wrong = tuple(", ".join([*names[: len(names) - n], *strange[:n]]) for n in (1, 2, len(names)))
    return Sample(put(lines, chain, places), (Question(ask, ", ".join(names), all_of(*names), wrong),))


def common(draw: Draw, count: int = 10) -> Sample:
    """A numbered list in which ten words come often and the others seldom (RULER, common words).

    30 times and 3 times, below 4,096 tokens 6 times and once. The seldom words are the haystack's.
    """
    often, seldom = (30, 3) if draw.tokens >= 4096 else (6, 1)
    pool = sorted({word for line in draw.prose.sentences for word in re.findall(r"\b[a-z]{4,9}\b", line)})
    rare = draw.rng.sample(pool, len(pool))
    most, rest = rare[:count], rare[count:]
    listed, have = most * often, often * sum(draw.prose.count(f" 100. {word}") for word in most)
    for word in rest:
        if have >= draw.tokens and len(listed) > often * count + 8:
            break
        listed += [word] * seldom
        have += seldom * draw.prose.count(f" 100. {word}")
    draw.rng.shuffle(listed)
    text = "A list of words:\n" + " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    less = draw.rng.sample(sorted(set(listed) - set(most)), min(count, len(set(listed)) - count))
    wrong = tuple(", ".join([*most[: count - n], *less[:n]]) for n in (2, 5, len(less)))
    ask = f"What are the {count} most common words in the list above? Answer with the {count} words."
    return Sample(text, (Question(ask, ", ".join(most), all_of(*most), wrong),))


def frequent(draw: Draw, vocabulary: int = 50) -> Sample:
    """Coded words drawn from a zeta distribution; the three most frequent (RULER, frequent words, α = 2).

    The k-th word comes with a probability proportional to 1/k²; the first three are apart in number by construction.
    """
    coded = list(dict.fromkeys("".join(draw.rng.choices(string.ascii_lowercase, k=6)) for _ in range(2 * vocabulary)))
    coded = coded[:vocabulary]
    weights = list(accumulate(1 / (k + 1) ** 2 for k in range(vocabulary)))
    each = sum(draw.prose.count(f" {word}") for word in coded) / vocabulary
    listed = draw.rng.choices(coded, cum_weights=weights, k=max(60, round(draw.tokens / each)))
    ranked = sorted(coded, key=lambda word: (-listed.count(word), coded.index(word)))
    listed += [ranked[2]] * max(0, 2 - (listed.count(ranked[2]) - listed.count(ranked[3])))  # no tie decides
    draw.rng.shuffle(listed)
    right, next_ones = ranked[:3], ranked[3:6]
    wrong = tuple(", ".join([*right[: 3 - n], *next_ones[:n]]) for n in (1, 2, 3))
    ask = "What are the three most frequent coded words in the text above? Answer with the three words."
    return Sample(f"A coded text: {' '.join(listed)}", (Question(ask, ", ".join(right), all_of(*right), wrong),))


def record(draw: Draw) -> Sample:
    """A person described in prose; a JSON object with a given schema asked, scored field by field."""
    rng = draw.rng
    who, town, trade, year = rng.choice(NAMES), rng.choice(CITIES), rng.choice(TRADES), str(rng.randrange(1900, 2000))
    fact = f"Let it be noted here that {who}, a {trade} from {town}, was born in the year {year}."
    right = {"name": who, "job": trade, "town": town, "born": year}
    schema = {"type": "object", "properties": {key: {"type": "string"} for key in right}, "required": list(right)}
    ask = (
        f"The text above mentions {who}. Write down what it says about {who} as a JSON object of the schema "
        f'{json.dumps(schema)}. For example: {{"name": "Rosa", "job": "clerk", "town": "Bonn", "born": "1950"}}'
    )
    pools = (("job", TRADES), ("town", CITIES), ("born", [str(y) for y in range(1900, 2000)]))
    wrong = tuple(json.dumps({**right, key: rng.choice([x for x in pool if x != right[key]])}) for key, pool in pools)
    text, (depth,) = hide(rng, draw.lines(fact), [fact])
    each = {key: fields(right, key) for key in right}
    return Sample(text, (Question(ask, json.dumps(right), fields(right), wrong, depth, each),))


def instructions(draw: Draw) -> Sample:
    """Three instructions at the head of a text, all to be obeyed in an answer asked for after it; each is checked."""
    rng = draw.rng
    start, end, word = rng.choice(NAMES), rng.choice(CITIES), rng.choice(WORDS)
    rules = (
        f'Rules for every answer: 1. Begin the answer with "{start}:". '
        f'2. Use the word "{word}". 3. End the answer with "{end}".'
    )

    def score(answer: str) -> float:
        bare = answer.strip().strip("\"'.")
        return (bare.startswith(f"{start}:") + (word in bare.lower()) + bare.endswith(end)) / 3

    ask = "Obey the rules given at the beginning and write one short sentence about the text."
    other = [rng.choice([x for x in pool if x != taken]) for pool, taken in ((NAMES, start), (WORDS, word), (CITIES, end))]
    wrong = (
        f"{other[0]}: The text is about a {word}. {end}", f"{start}: The text is about a {other[1]}. {end}",
        f"{start}: The text is about a {word}. {other[2]}",
    )  # fmt: skip
    right = f"{start}: The text is about a {word}. {end}"
    return Sample(f"{rules}\n\n{' '.join(draw.lines(rules))}", (Question(ask, right, score, wrong, 0.0),))


def turns(draw: Draw) -> Sample:
    """A conversation: eight facts are told in eight turns, with other talk between them; then each is asked for."""
    said = drawn_facts(draw.rng)
    lines = draw.lines(*(sentence for sentence, _ in said))
    told = []
    for i, (sentence, _) in enumerate(said):
        talk = lines[len(lines) * i // len(said) : len(lines) * (i + 1) // len(said)]
        told.append((" ".join([*talk, sentence]), "I see. I will remember that."))
    questions = tuple(
        Question(q.ask.replace("the text above", "what I told you"), q.expected, q.score, q.wrong, i / (len(said) - 1))
        for i, (_, q) in enumerate(said)
    )
    return Sample("", questions, tuple(told))


TASKS = (
    Task("pairs", "UUID keys and values in a JSON object", "arXiv 2307.03172", pairs),
    Task("variables", "a chain of assignments in prose", RULER, variables),
    Task("common", "the ten most common words of a list", RULER, common),
    Task("frequent", "the three most frequent coded words", RULER, frequent),
    Task("json", "a person described in prose, as JSON of a schema", "", record),
    Task("instructions", "three instructions at the head of a text", "", instructions),
    Task("turns", "eight facts told in eight turns through a live cache", "", turns, measure.turns),
)
