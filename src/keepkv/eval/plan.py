"""Plan: which samples and variants of a run are still to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from keepkv import methods
from keepkv.eval.config import Config
from keepkv.eval.records import Key, Record
from keepkv.eval.tasks import registry
from keepkv.eval.tasks.task import Task

Variant = tuple[str, str]  # method, budget


class Job(NamedTuple):
    """One sample, and which of its variants are missing."""

    task: str
    length: int
    number: int
    missing: tuple[Variant, ...]


def variants(config: Config) -> list[Variant]:
    """The full cache, and every method at every budget."""
    names = [methods.get(name).name for name in config.methods]
    return [("full", "100%"), *((name, budget) for budget in config.budgets for name in names if name != "full")]


def jobs(config: Config, done: Sequence[Record]) -> list[Job]:
    """What is left to do, samples before tasks, so that an interrupted run has some of everything."""
    have = {record.group for record in done}
    left = []
    for number in range(config.samples):
        for task in registry.chosen(config.tasks, config.data):
            for length in config.lengths if task.sized else (0,):
                if task.count is not None and number >= task.count:
                    continue
                keys = {v: Key(config.model, task.name, length, number, 0, *v) for v in variants(config)}
                missing = tuple(variant for variant, key in keys.items() if key not in have)
                if missing:
                    left.append(Job(task.name, length, number, missing))
    return left


@lru_cache(8)
def _tasks(names: tuple[str, ...], data: tuple[str, ...]) -> dict[str, Task]:
    return {task.name: task for task in registry.chosen(names, data)}
