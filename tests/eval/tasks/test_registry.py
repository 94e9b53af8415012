"""The tasks: samples are what they claim."""

from __future__ import annotations

import pytest

from eval.drawn import draw
from keepkv.eval.tasks import registry


@pytest.mark.parametrize("name", registry.TASKS)
def test_a_sample_holds_its_answers_and_no_wrong_one_scores_as_much(name: str) -> None:
    for number in range(3):
        task = registry.TASKS[name]
        sample, again = (task.make(draw(number, seed=f"{number}")) for _ in range(2))
        said = sample.text or " ".join(user for user, _ in sample.turns)
        assert said == (again.text or " ".join(user for user, _ in again.turns)), "seeded"
        assert said != (task.make(draw(number, seed="other")).text or "")
        assert 300 < len(said.split()) < 900 or name in ("pairs", "common", "frequent", "fidelity")
        for question in sample.questions:
            if question.wrong:
                assert question.score(question.expected) == 1.0
                assert max(map(question.score, question.wrong)) < 1.0
                assert len({question.expected, *question.wrong}) == 4


@pytest.mark.parametrize("name", ["needle", "needles-4", "needles-8-uuids", "multi-value", "multi-query", "facts", "pairs"])
def test_every_value_asked_for_stands_in_the_text_where_it_is_said_to(name: str) -> None:
    for number in range(5):
        sample = registry.TASKS[name].make(draw(number, seed=f"{number}"))
        for question in sample.questions:
            values = question.expected.split(" is ")[-1].strip(". ").split(", ")
            assert all(value in sample.text for value in values)
            if question.depth is not None and name.startswith("needle"):
                assert sample.text.index(values[0]) / len(sample.text) == pytest.approx(question.depth, abs=0.12)
