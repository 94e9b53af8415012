"""Scores of an answer in words, each from 0 to 1.

Every function but `plain` and `words` takes the right answers, and returns what scores an answer. ROUGE-L and edit similarity
are computed by the packages of the extra `eval`. The others are a few lines each, and tested against other implementations.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from keepkv.errors import InputError
from keepkv.eval.sample import Score


def plain(text: str) -> str:
    """Lower case, without commas, full stops and quotation marks, one space between words."""
    return re.sub(r"\s+", " ", re.sub(r"[,.'\"“”]", "", text.lower())).strip()


def any_of(*answers: str) -> Score:
    """1 if one of the right answers occurs in the answer (RULER, string_match_part).

    Example:
        >>> any_of("Oslo", "Riga")("It is riga.")
        1.0
    """
    return lambda answer: float(any(plain(right) in plain(answer) for right in answers))


def all_of(*answers: str) -> Score:
    """The share of the right answers that occur in the answer (RULER, string_match_all).

    Example:
        >>> all_of("Oslo", "Riga")("It is Riga.")
        0.5
    """
    return lambda answer: sum(plain(right) in plain(answer) for right in answers) / len(answers)


def named(*answers: str) -> Score:
    """1 if one of the right answers occurs in the answer as whole words.

    Example:
        >>> named("Lima")("Nothing but the climate."), named("Lima")("In Lima, I think.")
        (0.0, 1.0)
    """
    return lambda answer: float(any(_place(answer, right) is not None for right in answers))


def all_named(*answers: str) -> Score:
    """The share of the right answers that occur in the answer as whole words."""
    return lambda answer: sum(_place(answer, right) is not None for right in answers) / len(answers)


def first_named(right: str, wrong: str) -> Score:
    """1 if the right one of two answers occurs in the answer, and the wrong one not before it.

    Example:
        >>> first_named("Oslo", "Riga")("Oslo, no longer Riga."), first_named("Oslo", "Riga")("Riga, then Oslo.")
        (1.0, 0.0)
    """

    def score(answer: str) -> float:
        here, there = _place(answer, right), _place(answer, wrong)
        return float(here is not None and (there is None or here < there))

    return score


def _place(answer: str, right: str) -> int | None:
    match = re.search(rf"(?<!\w){re.escape(plain(right))}(?!\w)", plain(answer))
    return match and match.start()


def words(text: str) -> list[str]:
    """SQuAD's normal form: lower case, no punctuation, no articles, split at white space."""
    without_punctuation = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split()


def f1(*answers: str) -> Score:
    """SQuAD's F1: 2pr / (p + r) over words, the best over the right answers; p and r are shares of the words in common.

    Example:
        >>> f1("the cat sat")("A cat sat down")
        0.8
    """

    def f1_of_one(answer: str, right: str) -> float:
        predicted, expected = words(answer), words(right)
        common = sum((Counter(predicted) & Counter(expected)).values())
        return 2 * common / (len(predicted) + len(expected)) if common else float(predicted == expected)

    return lambda answer: max(f1_of_one(answer, right) for right in answers)


def exact(*answers: str) -> Score:
    """1 if the answer is one of the right answers in SQuAD's normal form."""
    return lambda answer: float(any(words(answer) == words(right) for right in answers))


def rouge_l(*answers: str) -> Score:
    """ROUGE-L's F1 by the package rouge-score, the best over the right answers (Lin 2004): 2 LCS / (m + n) over words.

    LCS is the length of the longest common subsequence, m and n are the numbers of words. Words are those of rouge-score, with
    the letters of every language.

    Raises:
        InputError: without keepkv[eval].
    """
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_Words())
    return lambda answer: max(float(scorer.score(right, answer)["rougeL"].fmeasure) for right in answers)


class _Words:
    """The words of rouge-score's own tokenizer, which takes only the letters from a to z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def code_similarity(*answers: str) -> Score:
    """Edit similarity, by RapidFuzz, of the first line that is no comment to the right line (LongBench's code tasks).

    It is 1 - d / (m + n): d insertions and deletions turn one line into the other, m and n are the numbers of letters.

    Raises:
        InputError: without keepkv[eval].
    """
    ratio = _library("rapidfuzz.fuzz").ratio

    def score(answer: str) -> float:
        lines = [line for line in answer.splitlines() if line.strip() and not line.lstrip().startswith(("`", "#", "//"))]
        return max(float(ratio(lines[0], right)) / 100 for right in answers) if lines else 0.0

    return score


def _library(module: str) -> Any:
    """A module of the extra `eval`. Raises InputError if it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0].replace("_", "-")
        raise InputError(f"this score is computed by the package {package}: pip install 'keepkv[eval]'") from None


def last_number(right: str) -> Score:
    """1 if the last number of the answer is the right one (GSM8K).

    Example:
        >>> last_number("1,200")("first 3, so 1200.")
        1.0
    """

    def score(answer: str) -> float:
        matches = re.findall(r"-?\d[\d,]*\.?\d*", answer)
        return float(bool(matches) and float(matches[-1].replace(",", "")) == float(right.replace(",", "")))

    return score


def numbers(*answers: str) -> Score:
    """The share of the answer's numbers that are the right one (LongBench's counting and paragraph retrieval)."""
    right = {number for answer in answers for number in re.findall(r"\d+", answer)}

    def score(answer: str) -> float:
        matches = re.findall(r"\d+", answer)
        return sum(number in right for number in matches) / len(matches) if matches else 0.0

    return score


def fields(expected: Mapping[str, str], *keys: str) -> Score:
    """The share of fields that are right in the first JSON object of the answer.

    0 if that is no JSON, or breaks the schema, that is, has other keys, or values that are not strings.

    Args:
        expected: The right values.
        keys: The fields that count; none given: all of them.
    """
    counted = keys or tuple(expected)

    def score(answer: str) -> float:
        match = re.search(r"\{.*?\}", answer, re.DOTALL)
        try:
            values = json.loads(match[0]) if match else {}
        except json.JSONDecodeError:
            values = {}
        if not set(values) <= set(expected) or not all(isinstance(value, str) for value in values.values()):
            return 0.0
        return sum(plain(values.get(key, "")) == plain(expected[key]) for key in counted) / len(counted)

    return score
