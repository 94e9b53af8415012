"""The table of tasks: every file of this folder that has some, in the order in which they are listed; and files as tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from keepkv.errors import InputError, nearest
from keepkv.eval.sample import Draw, Sample
from keepkv.eval.tasks import datasets
from keepkv.eval.tasks.task import Task

_FILES = (
    "needles",
    "synthetic",
    "continuation",
)

TASKS: dict[str, Task] = {task.name: task for file in _FILES for task in import_module(f"keepkv.eval.tasks.{file}").TASKS}


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
    return Task(name, f"{len(found)} rows of {place}", kind.source, make, sized=kind.sized, count=count)


def chosen(names: Sequence[str], data: Sequence[str]) -> list[Task]:
    """The tasks that are named, and those of the files. Raises InputError."""
    tasks = [get(name) for name in names] + [from_file(place) for place in data]
    twice = {task.name for task in tasks if [other.name for other in tasks].count(task.name) > 1}
    if twice:
        raise InputError(f"two tasks are called {sorted(twice)[0]!r}: give the file another name")
    return tasks
