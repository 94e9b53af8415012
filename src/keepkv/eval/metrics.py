"""Scores of an answer in words, each in [0, 1]."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping
from difflib import SequenceMatcher

from keepkv.eval.sample import Score


def plain(text: str) -> str:
    """Lower case, without commas, stops and quotation marks, one space between words."""
    return re.sub(r"\s+", " ", re.sub(r"[,.'\"“”]", "", text.lower())).strip()


def any_of(*answers: str) -> Score:
    """1 if one of the right answers occurs in what was written (RULER, string_match_part)."""
    return lambda answer: float(any(plain(right) in plain(answer) for right in answers))


def all_of(*answers: str) -> Score:
    """The share of the right answers that occur in what was written (RULER, string_match_all)."""
    return lambda answer: sum(plain(right) in plain(answer) for right in answers) / len(answers)


def words(text: str) -> list[str]:
    """SQuAD's normal form: lower case, no punctuation, no articles, cut at white space."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1(*answers: str) -> Score:
    """SQuAD's F1: 2pr / (p + r) over words, the best over the right answers; p and r are shares of the words in common."""

    def one(answer: str, right: str) -> float:
        got, want = words(answer), words(right)
        common = sum((Counter(got) & Counter(want)).values())
        return 2 * common / (len(got) + len(want)) if common else float(got == want)

    return lambda answer: max(one(answer, right) for right in answers)


def exact(*answers: str) -> Score:
    """1 if what was written is one of the right answers in SQuAD's normal form."""
    return lambda answer: float(any(words(answer) == words(right) for right in answers))


def rouge_l(*answers: str) -> Score:
    """ROUGE-L's F1: 2 LCS / (m + n) over words, the best over the right answers (Lin 2004)."""

    def one(answer: str, right: str) -> float:
        got, want = plain(answer).split(), plain(right).split()
        row = [0] * (len(want) + 1)
        for word in got:
            left = 0
            for i, other in enumerate(want, 1):
                left, row[i] = row[i], left + 1 if word == other else max(row[i], row[i - 1])
        return 2 * row[-1] / (len(got) + len(want)) if got and want else 0.0

    return lambda answer: max(one(answer, right) for right in answers)


def alike(*answers: str) -> Score:
    """How alike the first line that is no comment is to a line of code, by difflib's ratio (LongBench's code tasks)."""

    def score(answer: str) -> float:
        lines = [line for line in answer.splitlines() if line.strip() and not line.lstrip().startswith(("`", "#", "//"))]
        return max(SequenceMatcher(None, lines[0], right).ratio() for right in answers) if lines else 0.0

    return score


def last_number(right: str) -> Score:
    """1 if the last number that was written is the right one (GSM8K)."""

    def score(answer: str) -> float:
        found = re.findall(r"-?\d[\d,]*\.?\d*", answer)
        return float(bool(found) and float(found[-1].replace(",", "")) == float(right.replace(",", "")))

    return score


def numbers(*answers: str) -> Score:
    """The share of the numbers written that are the right one (LongBench's counting and paragraph retrieval)."""
    right = {number for answer in answers for number in re.findall(r"\d+", answer)}

    def score(answer: str) -> float:
        found = re.findall(r"\d+", answer)
        return sum(number in right for number in found) / len(found) if found else 0.0

    return score


def fields(expected: Mapping[str, str], *keys: str) -> Score:
    """The share of a JSON object's fields that are right (all of them, or these), of the first object written.

    0 if it is no JSON, or breaks the schema: has other keys, or values that are not strings.
    """

    def score(answer: str) -> float:
        found = re.search(r"\{.*?\}", answer, re.DOTALL)
        try:
            got = json.loads(found[0]) if found else {}
        except json.JSONDecodeError:
            got = {}
        if not set(got) <= set(expected) or not all(isinstance(value, str) for value in got.values()):
            return 0.0
        return sum(plain(got.get(key, "")) == plain(expected[key]) for key in keys or expected) / len(keys or expected)

    return score
