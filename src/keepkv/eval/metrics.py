"""Scores of an answer in words, each from 0 to 1.

Every function but `plain` and `words` takes the right answers, and returns what scores an answer.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping
from difflib import SequenceMatcher

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
    """ROUGE-L's F1: 2 LCS / (m + n) over words, the best over the right answers (Lin 2004).

    LCS is the length of the longest common subsequence, m and n are the numbers of words.
    """

    def rouge_of_one(answer: str, right: str) -> float:
        predicted, expected = plain(answer).split(), plain(right).split()
        lengths = [0] * (len(expected) + 1)  # lengths[i]: of the longest common subsequence with the first i words
        for word in predicted:
            diagonal = 0
            for i, other in enumerate(expected, 1):
                above = lengths[i]
                lengths[i] = diagonal + 1 if word == other else max(above, lengths[i - 1])
                diagonal = above
        return 2 * lengths[-1] / (len(predicted) + len(expected)) if predicted and expected else 0.0

    return lambda answer: max(rouge_of_one(answer, right) for right in answers)


def code_similarity(*answers: str) -> Score:
    """Similarity of the first line that is no comment to the right line, by difflib's ratio (LongBench's code tasks)."""

    def score(answer: str) -> float:
        lines = [line for line in answer.splitlines() if line.strip() and not line.lstrip().startswith(("`", "#", "//"))]
        return max(SequenceMatcher(None, lines[0], right).ratio() for right in answers) if lines else 0.0

    return score


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
