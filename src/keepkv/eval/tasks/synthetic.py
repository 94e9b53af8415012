"""Tasks on what must be tracked, counted or extracted: key-value pairs, variables, words, a record, instructions, turns."""

from __future__ import annotations

import json
import re
import string
from bisect import bisect_left
from dataclasses import replace
from itertools import accumulate, pairwise

from keepkv.eval import measure
from keepkv.eval.metrics import all_of, any_of, fields, named
from keepkv.eval.sample import Draw, Question, Sample, hide, joined, put
from keepkv.eval.tasks import facts
from keepkv.eval.tasks.needles import CITIES, MANNERS, NAMES, TRADES, WORDS, value
from keepkv.eval.tasks.task import RULER, Task, twice

SURNAMES = ["Adams", "Berg", "Costa", "Duval", "Evans", "Fischer", "Gomez", "Hansen", "Ito", "Jansen", "Keller", "Lopez"]
GOODS = ["lamps", "boots", "clocks", "kites", "violins", "candles", "maps", "spices", "buttons", "bicycles", "mirrors", "toys"]


def pairs(draw: Draw) -> Sample:
    """UUID keys and values in one JSON object; four values asked (key-value retrieval, arXiv 2307.03172, section 3)."""
    table: list[tuple[str, str]] = []
    total = 0
    while len(table) < 4 or total < draw.tokens:
        table.append((value(draw.rng, "uuids"), value(draw.rng, "uuids")))
        total += draw.prose.count(_line(*table[-1]))
    return among_pairs(draw, table, sorted(draw.rng.sample(range(len(table)), 4)))


def among_pairs(draw: Draw, table: list[tuple[str, str]], indices: list[int]) -> Sample:
    """The object, and a question for each pair of these indices; the wrong answers are other pairs' values."""
    body = ",\n".join(_line(*pair) for pair in table)
    questions = []
    for i in indices:
        key, right = table[i]
        others = draw.rng.sample([other for _, other in table if other != right], 3)
        wrong = tuple(f'"{other}"' for other in others)
        ask = f'What is the value of the key "{key}"? Answer with the value.'
        depth = i / max(1, len(table) - 1)
        questions.append(Question(ask, f'"{right}"', any_of(right), wrong, depth))
    return Sample(f"JSON data:\n{{{body}}}", tuple(questions))


def _line(key: str, right: str) -> str:
    return f' "{key}": "{right}"'


def lookup(draw: Draw) -> Sample:
    """A nested document about shops, by town and name; four of its values are asked for by their keys."""
    rng = draw.rng
    names = [(town, f"{manner} {word}") for town in CITIES for manner in MANNERS for word in WORDS]
    shops = {
        place: {
            "owner": f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}",
            "phone": str(rng.randrange(10**5, 10**6)),
            "sells": rng.choice(GOODS),
            "founded": str(rng.randrange(1800, 2000)),
        }
        for place in rng.sample(names, len(names))
    }
    sizes = range(5, len(shops))
    size = sizes[max(0, bisect_left(sizes, draw.tokens, key=lambda size: draw.prose.count(_document(shops, size))) - 1)]
    text = _document(shops, size)
    places = sorted(list(shops)[:size], key=lambda place: text.index(shops[place]["phone"]))
    questions = []
    for place in sorted(rng.sample(places, 4), key=places.index):
        key = rng.choice(list(shops[place]))
        right = shops[place][key]
        others = sorted({shops[other][key] for other in places} - {right})
        wrong = tuple(rng.sample(others, 3)) if len(others) >= 3 else ()
        ask = f'In the JSON document above, what is the "{key}" of "{place[1]}" in "{place[0]}"? Answer with the value.'
        questions.append(Question(ask, right, named(right), wrong, places.index(place) / (size - 1)))
    return Sample(text, tuple(questions))


def _document(shops: dict[tuple[str, str], dict[str, str]], size: int) -> str:
    towns: dict[str, dict[str, dict[str, str]]] = {}
    for town, name in list(shops)[:size]:
        towns.setdefault(town, {})[name] = shops[town, name]
    return "A JSON document about shops:\n" + json.dumps(towns, indent=1)


def variables(draw: Draw, hops: int = 4) -> Sample:
    """One chain of assignments hidden in prose; which variables hold the value (RULER, variable tracking, four hops)."""
    pool = list(dict.fromkeys("".join(draw.rng.choices(string.ascii_uppercase, k=5)) for _ in range(4 * hops)))
    names, other_names = pool[: hops + 1], pool[hops + 1 : 2 * hops + 2]
    number = str(draw.rng.randrange(10**4, 10**5))
    chain = [f"VAR {names[0]} = {number}."] + [f"VAR {new} = VAR {old}." for old, new in pairwise(names)]
    lines = draw.lines(*chain)
    gaps = range(1, len(lines) + 1)
    places = sorted(draw.rng.sample(gaps, len(chain)) if len(gaps) >= len(chain) else draw.rng.choices(gaps, k=len(chain)))
    ask = f"Find all variables that are assigned the value {number} in the text above. Answer with their names."
    wrong = tuple(", ".join([*names[: len(names) - n], *other_names[:n]]) for n in (1, 2, len(names)))
    return Sample(put(lines, chain, places), (Question(ask, ", ".join(names), all_of(*names), wrong),))


def common(draw: Draw, count: int = 10) -> Sample:
    """A numbered list in which ten words are common and the others are rare (RULER, common words).

    A common word stands there 30 times and a rare one 3 times; below 4,096 tokens 6 times and once. All words are the
    haystack's.
    """
    common_times, rare_times = (30, 3) if draw.tokens >= 4096 else (6, 1)
    pool = sorted({word for line in draw.prose.sentences for word in re.findall(r"\b[a-z]{4,9}\b", line)})
    shuffled = draw.rng.sample(pool, len(pool))
    common_words, rare_words = shuffled[:count], shuffled[count:]
    entries = common_words * common_times
    total = common_times * sum(draw.prose.count(f" 100. {word}") for word in common_words)
    for word in rare_words:
        if total >= draw.tokens and len(entries) > common_times * count + 8:
            break
        entries += [word] * rare_times
        total += rare_times * draw.prose.count(f" 100. {word}")
    draw.rng.shuffle(entries)
    text = "A list of words:\n" + " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
    rare_in_text = sorted(set(entries) - set(common_words))
    others = draw.rng.sample(rare_in_text, min(count, len(rare_in_text)))
    wrong = tuple(", ".join([*common_words[: count - n], *others[:n]]) for n in (2, 5, len(others)))
    ask = f"What are the {count} most common words in the list above? Answer with the {count} words."
    return Sample(text, (Question(ask, ", ".join(common_words), all_of(*common_words), wrong),))


def frequent(draw: Draw, vocabulary: int = 50) -> Sample:
    """Coded words drawn from a zeta distribution; the three most frequent (RULER, frequent words, α = 2).

    The k-th word comes with a probability proportional to 1/k²; the first three are apart in number by construction.
    """
    pool = list(dict.fromkeys("".join(draw.rng.choices(string.ascii_lowercase, k=6)) for _ in range(2 * vocabulary)))
    coded_words = pool[:vocabulary]
    weights = list(accumulate(1 / (k + 1) ** 2 for k in range(vocabulary)))
    tokens_per_word = sum(draw.prose.count(f" {word}") for word in coded_words) / vocabulary
    words = draw.rng.choices(coded_words, cum_weights=weights, k=max(60, round(draw.tokens / tokens_per_word)))
    by_frequency = sorted(coded_words, key=lambda word: (-words.count(word), coded_words.index(word)))
    third, fourth = by_frequency[2], by_frequency[3]
    words += [third] * max(0, 2 - (words.count(third) - words.count(fourth)))  # so that no tie decides
    draw.rng.shuffle(words)
    right, next_words = by_frequency[:3], by_frequency[3:6]
    wrong = tuple(", ".join([*right[: 3 - n], *next_words[:n]]) for n in (1, 2, 3))
    ask = "What are the three most frequent coded words in the text above? Answer with the three words."
    return Sample(f"A coded text: {' '.join(words)}", (Question(ask, ", ".join(right), all_of(*right), wrong),))


def record(draw: Draw) -> Sample:
    """A person described in prose; a JSON object with a given schema asked, scored field by field."""
    rng = draw.rng
    name = rng.choice(NAMES)
    town = rng.choice(CITIES)
    trade = rng.choice(TRADES)
    year = str(rng.randrange(1900, 2000))
    fact = f"Let it be noted here that {name}, a {trade} from {town}, was born in the year {year}."
    right = {"name": name, "job": trade, "town": town, "born": year}
    schema = {"type": "object", "properties": {key: {"type": "string"} for key in right}, "required": list(right)}
    ask = (
        f"The text above mentions {name}. Write down what it says about {name} as a JSON object of the schema "
        f'{json.dumps(schema)}. For example: {{"name": "Rosa", "job": "clerk", "town": "Bonn", "born": "1950"}}'
    )
    pools = (("job", TRADES), ("town", CITIES), ("born", [str(y) for y in range(1900, 2000)]))
    wrong = tuple(json.dumps({**right, key: rng.choice([x for x in pool if x != right[key]])}) for key, pool in pools)
    text, (depth,) = hide(rng, draw.lines(fact), [fact])
    by_field = {key: fields(right, key) for key in right}
    return Sample(text, (Question(ask, json.dumps(right), fields(right), wrong, depth, by_field),))


def instructions(draw: Draw) -> Sample:
    """Three instructions at the head of a text, all to be obeyed in an answer asked for after it; each is checked."""
    rng = draw.rng
    start = rng.choice(NAMES)
    end = rng.choice(CITIES)
    word = rng.choice(WORDS)
    rules = (
        f'Rules for every answer: 1. Begin the answer with "{start}:". '
        f'2. Use the word "{word}". 3. End the answer with "{end}".'
    )

    def score(answer: str) -> float:
        text = answer.strip().strip("\"'.")
        followed = (text.startswith(f"{start}:"), word in text.lower(), text.endswith(end))
        return sum(followed) / 3

    ask = "Obey the rules given at the beginning and write one short sentence about the text."
    other_start = rng.choice([name for name in NAMES if name != start])
    other_word = rng.choice([other for other in WORDS if other != word])
    other_end = rng.choice([city for city in CITIES if city != end])
    right = f"{start}: The text is about a {word}. {end}"
    wrong = (
        f"{other_start}: The text is about a {word}. {end}",
        f"{start}: The text is about a {other_word}. {end}",
        f"{start}: The text is about a {word}. {other_end}",
    )
    return Sample(f"{rules}\n\n{joined(draw.lines(rules))}", (Question(ask, right, score, wrong, 0.0),))


def turns(draw: Draw, paraphrased: bool = False) -> Sample:
    """A conversation: eight facts are told in eight turns, with other talk between them; then each is asked for."""
    drawn = facts.drawn(draw, paraphrased=paraphrased, ending=", according to what I told you?")
    lines = draw.lines(*(question.expected for question in drawn))
    conversation = []
    for i, question in enumerate(drawn):
        talk = lines[len(lines) * i // len(drawn) : len(lines) * (i + 1) // len(drawn)]
        conversation.append((joined([*talk, question.expected]), "I see. I will remember that."))
    questions = (replace(question, depth=i / (len(drawn) - 1)) for i, question in enumerate(drawn))
    return Sample("", tuple(questions), tuple(conversation))


TASKS = (
    Task("pairs", "UUID keys and values in a JSON object", "arXiv 2307.03172", pairs),
    Task("json-values", "values of a nested JSON document, asked for by their keys", "", lookup),
    Task("variables", "a chain of assignments in prose", RULER, variables),
    Task("common", "the ten most common words of a list", RULER, common),
    Task("frequent", "the three most frequent coded words", RULER, frequent),
    Task("json", "a person described in prose, as JSON of a schema", "", record),
    Task("instructions", "three instructions at the head of a text", "", instructions),
    *twice("turns", "eight facts told in eight turns through a live cache", turns, measure.prepare_turns),
)
