"""The table of tasks: those of every file of this folder that has some, in the order of the list; and files as tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from keepkv.errors import InputError, nearest
from keepkv.eval.sample import Draw, Sample
from keepkv.eval.tasks import datasets
from keepkv.eval.tasks.task import Task

_FILES = (
    "needles",
    "facts",
    "languages",
    "code",
    "synthetic",
    "continuation",
)

TASKS: dict[str, Task] = {task.name: task for file in _FILES for task in import_module(f"keepkv.eval.tasks.{file}").TASKS}


def get(name: str) -> Task:
    """The task of that name. Raises InputError."""
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}: {nearest(name, TASKS)} `keepkv eval --list` explains each")
    return TASKS[name]


def from_file(place: str) -> Task:
    """A file of another benchmark as a task, named after the file. Raises InputError."""
    rows = datasets.rows(place)
    kind = datasets.format_of(place, rows)
    for score in kind.scores(rows):
        score("")  # says now which package is missing
    order = random.Random(0).sample(range(len(rows)), len(rows))

    def make(draw: Draw) -> Sample:
        number = draw.number if kind.sized else order[draw.number]
        return kind.make(replace(draw, number=number % len(rows)), rows)

    name = Path(place.removeprefix("hf:")).name.split(".")[0].replace(":", "-")
    count = None if kind.sized else len(rows)
    return Task(name, f"{len(rows)} rows of {place}", kind.source, make, sized=kind.sized, count=count)


def chosen(names: Sequence[str], data: Sequence[str]) -> list[Task]:
    """The tasks that are named, and those of the files. Raises InputError."""
    tasks = [get(name) for name in names] + [from_file(place) for place in data]
    names_in_use = [task.name for task in tasks]
    duplicates = sorted(name for name in names_in_use if names_in_use.count(name) > 1)
    if duplicates:
        raise InputError(
            f"two tasks are called {duplicates[0]!r}: name each task once, and rename a file that has a task's name"
        )
    return tasks
