"""Plan: which samples and variants of a run are still to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from keepkv.eval.config import Config
from keepkv.eval.records import Record, RecordKey
from keepkv.eval.tasks import registry
from keepkv.eval.tasks.task import Task
from keepkv.methods import get

MethodAtBudget = tuple[str, str]


class Job(NamedTuple):
    """One sample, and which methods at which budgets are still missing."""

    task: str
    length: int
    number: int
    missing: tuple[MethodAtBudget, ...]


def variants(config: Config) -> list[MethodAtBudget]:
    """The full cache, and every method at every budget."""
    names = [get(name).name for name in config.methods]
    return [("full", "100%"), *((name, budget) for budget in config.budgets for name in names if name != "full")]


def jobs(config: Config, records: Sequence[Record]) -> list[Job]:
    """What is missing in the records, samples before tasks, so that an interrupted run has some of everything."""
    finished = {record.group for record in records}
    missing_jobs = []
    for number in range(config.samples):
        for task in registry.chosen(config.tasks, config.data):
            for length in config.lengths if task.sized else (0,):
                if task.count is not None and number >= task.count:
                    continue
                keys = {v: RecordKey(config.model, task.name, length, number, 0, *v) for v in variants(config)}
                missing = tuple(variant for variant, key in keys.items() if key not in finished)
                if missing:
                    missing_jobs.append(Job(task.name, length, number, missing))
    return missing_jobs


@lru_cache(8)
def tasks_by_name(names: tuple[str, ...], data: tuple[str, ...]) -> dict[str, Task]:
    """The tasks that are named, and those of the files."""
    return {task.name: task for task in registry.chosen(names, data)}
