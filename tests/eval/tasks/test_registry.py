"""The tasks: samples are what they claim."""

from __future__ import annotations

import json
import random
import re

import pytest

from eval.drawn import PROSE, draw
from keepkv.eval.sample import Draw
from keepkv.eval.tasks import registry

LISTS = ("pairs", "json-values", "common", "frequent")  # texts without prose
OTHER = ("variables", "common", "frequent", "json", "instructions", "fidelity", "drift")
VALUES = [name for name in registry.TASKS if name not in OTHER]
DEEP = [name for name in VALUES if name.startswith(("needle", "facts", "easy-facts", "corrected"))]


@pytest.mark.parametrize("name", registry.TASKS)
def test_a_sample_holds_its_answers_and_no_wrong_one_scores_as_much(name: str) -> None:
    for number in range(3):
        task = registry.TASKS[name]
        sample, again = (task.make(draw(number, seed=f"{number}")) for _ in range(2))
        said = sample.text or " ".join(user for user, _ in sample.turns)
        assert said == (again.text or " ".join(user for user, _ in again.turns)), "seeded"
        assert [q.ask for q in sample.questions] == [q.ask for q in again.questions]
        assert said != (task.make(draw(number, seed="other")).text or "")
        assert 300 < len(said.split()) < 900 or name in (*LISTS, "fidelity")
        for question in sample.questions:
            if question.wrong:
                assert question.score(question.expected) == 1.0
                assert max(map(question.score, question.wrong)) < 1.0
                assert len({question.expected, *question.wrong}) == 4
                assert question.score("I do not know.") == 0


@pytest.mark.parametrize("name", VALUES)
def test_every_value_asked_for_stands_once_in_the_text_and_where_it_is_said_to(name: str) -> None:
    for number in range(5):
        sample = registry.TASKS[name].make(draw(number, seed=f"{number}"))
        said = sample.text or " ".join(user for user, _ in sample.turns)
        for question in sample.questions:
            expected = question.expected
            if expected.endswith(".") and not name.startswith("corrected"):
                assert said.count(expected) == 1, "the sentence, once"
            values = expected.split(" is ")[-1].strip(". ").split(", ")
            assert all(value.lower() in said.lower() for value in values)
            if question.depth is not None and name in DEEP:
                place = said.lower().rindex(values[0].lower()) / len(said)
                assert place == pytest.approx(question.depth, abs=0.12)


@pytest.mark.parametrize(
    "name", [name for name in registry.TASKS if name not in ("variables", "common", "frequent", "fidelity")]
)
def test_texts_have_about_as_many_tokens_as_were_asked_for(name: str) -> None:
    for number, tokens in enumerate((1000, 2000)):
        sample = registry.TASKS[name].make(Draw(random.Random(number), PROSE, tokens, number))
        said = sample.text or " ".join(user for user, _ in sample.turns)
        assert PROSE.count(said) == pytest.approx(tokens, rel=0.1)


def test_what_was_said_first_is_scored_apart_from_its_correction() -> None:
    for name in ("corrected", "corrected-paraphrased"):
        sample = registry.TASKS[name].make(draw(0))
        for question in sample.questions:
            old = question.wrong[0]
            assert sample.text.index(old) < sample.text.index(
                f"Correction: {question.expected[0].lower()}{question.expected[1:-1]}, not "
            )
            assert (question.score(old), question.more["old"](old)) == (0, 1)
            assert (question.score(question.expected), question.more["old"](question.expected)) == (1, 0)


def test_ten_facts_are_scored_by_their_share() -> None:
    (question,) = registry.TASKS["ten-facts"].make(draw(0)).questions
    animals = question.expected.split(", ")
    assert len(set(animals)) == 10
    assert question.score(" and ".join(animals[:5])) == 0.5


def test_code_is_python_with_the_values_asked_for() -> None:
    sample = registry.TASKS["code"].make(draw(1, tokens=1000))
    assert len(re.findall(r"^(?:async )?def \w+\(", sample.text, re.MULTILINE)) > 5
    compile(sample.text, "sample", "exec")
    for question in sample.questions:
        (place,) = re.finditer(rf' ?= ?"?{question.expected}"?(?=\n|\))', sample.text)
        assert place.start() / len(sample.text) == pytest.approx(question.depth, abs=0.02)


def test_json_values_are_those_of_the_document() -> None:
    sample = registry.TASKS["json-values"].make(draw(1))
    document = json.loads(sample.text.partition("\n")[2])
    for question in sample.questions:
        key, name, town = re.findall('"(.*?)"', question.ask)
        assert document[town][name][key] == question.expected


def test_a_document_too_long_for_what_is_asked_is_the_smallest_there_is() -> None:
    """It was the largest, 30 times as long."""
    small = registry.TASKS["json-values"].make(draw(1, tokens=64)).text
    assert len(json.loads(small.partition("\n")[2])) <= 5
    assert len(small) < len(registry.TASKS["json-values"].make(draw(1, tokens=1000)).text)
