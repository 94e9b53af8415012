"""The table of tasks. A task is one row: how its samples are made, and how they are measured.

Adding one: a function Draw -> Sample (needles.py and structures.py have examples), and a row here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from keepkv.errors import InputError, nearest
from keepkv.eval import drift, measure
from keepkv.eval.sample import Draw, Question, Sample
from keepkv.eval.tasks import datasets, needles, synthetic
from keepkv.eval.tasks.task import Task

RULER = "RULER, arXiv 2404.06654"


def _text(draw: Draw, more: int = 0) -> Sample:
    """Prose alone, with so many tokens more than the length."""
    lines = draw.prose.stretch(draw.rng, draw.tokens + more)
    return Sample(" ".join(lines), (Question("", "", lambda answer: 0.0),))


def _ask(name: str, summary: str, source: str, make: object) -> Task:
    return Task(name, summary, source, make, measure.questions)  # type: ignore[arg-type]


TASKS = {
    task.name: task
    for task in (
        _ask("needle", "one number in prose, at five depths", RULER, needles.needles),
        _ask("needle-words", "two words in prose, at five depths", RULER, partial(needles.needles, kind="words")),
        _ask("needle-uuids", "one UUID in prose, at five depths", RULER, partial(needles.needles, kind="uuids")),
        _ask("needles-4", "four numbers with a key each, asked one by one", RULER, partial(needles.needles, keys=4)),
        _ask("needles-8", "eight keys, four of them asked one by one", RULER, partial(needles.needles, keys=8)),
        _ask("needles-8-uuids", "the same with UUIDs", RULER, partial(needles.needles, keys=8, kind="uuids")),
        _ask("multi-value", "four numbers of one key, in one question", RULER, needles.multivalue),
        _ask("multi-query", "four keys in one question", RULER, needles.multiquery),
        _ask("facts", "eight unlike facts, one in each eighth of the text", "", needles.facts),
        _ask("pairs", "UUID keys and values in a JSON object", "arXiv 2307.03172", synthetic.pairs),
        _ask("variables", "a chain of assignments in prose", RULER, synthetic.variables),
        _ask("common", "the ten most common words of a list", RULER, synthetic.common),
        _ask("frequent", "the three most frequent coded words", RULER, synthetic.frequent),
        _ask("json", "a person described in prose, as JSON of a schema", "", synthetic.record),
        _ask("instructions", "three instructions at the head of a text", "", synthetic.instructions),
        Task("turns", "eight facts told in eight turns through a live cache", "", synthetic.turns, measure.turns),
        Task(
            "fidelity", "the next-token distributions over a text's true continuation", "",
            partial(_text, more=measure.CONTINUATION), measure.continued,
        ),
        Task("drift", "what 2,000 written tokens do to a live cache: KL and repetition", "", _text, drift.drifted),
    )
}  # fmt: skip


def get(name: str) -> Task:
    """The row of that name. Raises InputError."""
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}: {nearest(name, TASKS)} `keepkv eval --list` explains each")
    return TASKS[name]


def from_file(place: str) -> Task:
    """A file of another benchmark as a task, named after the file. Raises InputError."""
    found = datasets.rows(place)
    kind = datasets.understood(place, found)
    order = random.Random(0).sample(range(len(found)), len(found))

    def make(draw: Draw) -> Sample:
        number = draw.number if kind.sized else order[draw.number]
        return kind.make(Draw(draw.rng, draw.prose, draw.tokens, number % len(found)), found)

    name = Path(place.removeprefix("hf:")).name.split(".")[0].replace(":", "-")
    count = None if kind.sized else len(found)
    return Task(name, f"{len(found)} rows of {place}", kind.source, make, measure.questions, kind.sized, count)


def chosen(names: Sequence[str], data: Sequence[str]) -> list[Task]:
    """The tasks that are named, and those of the files. Raises InputError."""
    tasks = [get(name) for name in names] + [from_file(place) for place in data]
    twice = {task.name for task in tasks if [other.name for other in tasks].count(task.name) > 1}
    if twice:
        raise InputError(f"two tasks are called {sorted(twice)[0]!r}: give the file another name")
    return tasks
