"""Plan: which samples and variants of a run are still to be measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from keepkv.errors import MethodError, nearest
from keepkv.eval.config import Config
from keepkv.eval.records import Record, RecordKey
from keepkv.eval.rivals.registry import RIVALS
from keepkv.eval.rivals.rival import Rival
from keepkv.eval.tasks import registry
from keepkv.eval.tasks.task import Task
from keepkv.methods import METHODS, Method, get
from keepkv.slots.slot_dtype import AUTO_FORMATS

ALL = "all"  # among the methods: every one of the table


class Variant(NamedTuple):
    """A method, or a rival, at a budget, and how its slots are stored."""

    method: str
    budget: str
    slot_dtype: str = "float"


FULL_CACHE = Variant("full", "100%")  # what everything is compared with
QUANTIZED = "kivi"  # the method that keeps every token in the slot dtype: quantization of everything


class Job(NamedTuple):
    """One sample of a model, and which variants are still missing."""

    model: str
    task: str
    length: int
    number: int
    missing: tuple[Variant, ...]


def named(names: Sequence[str], table: Mapping[str, object]) -> tuple[str, ...]:
    """The names, each once, with those of a table in place of "all"."""
    return tuple(dict.fromkeys(one for name in names for one in (table if name == ALL else (name,))))


def contenders(names: Sequence[str]) -> dict[str, Method | Rival]:
    """The full cache, exact and quantized, and the methods and rivals of these names, by what the records call them.

    Raises:
        MethodError: for an unknown name, and for two methods that are called the same.
    """
    return dict(_contenders(tuple(names)))


@lru_cache(8)
def _contenders(names: tuple[str, ...]) -> Mapping[str, Method | Rival]:
    found: dict[str, Method | Rival] = {name: get(name) for name in (FULL_CACHE.method, QUANTIZED)}
    for name in names:
        one = RIVALS[name] if name in RIVALS else _method(name)
        if found.setdefault(one.name, one) is not one:
            raise MethodError(f"two methods are called {one.name!r}, {name} among them: give each a name of its own")
    return found


def _method(name: str) -> Method:
    """The method of that name. Raises MethodError."""
    if ":" not in name and not name.endswith(".py") and name not in METHODS:
        raise MethodError(
            f"unknown method or rival {name!r}: {nearest(name, [*METHODS, *RIVALS])} `keepkv methods` explains each"
        )
    return get(name)


def variants(config: Config, task: Task | None = None) -> list[Variant]:
    """The full cache, the full cache in every slot dtype that rounds it, and every method at every budget in every slot dtype.

    What cannot be is left out: a rival where it does not apply or with quantized slots, and a method that stores two layers'
    slots together with quantized ones.

    Args:
        config: The run's settings.
        task: The task; None: any that is a text and questions.
    """
    table = contenders(config.methods)
    exact = ("float", "auto")  # for layers in pairs, auto is float
    rounded = [name for name in config.slot_dtypes if name not in exact]
    if "auto" in config.slot_dtypes and QUANTIZED in config.methods and AUTO_FORMATS[-1].name not in rounded:
        rounded.append("auto")  # for what keeps every token: the fewest bits
    found = [FULL_CACHE, *(Variant(QUANTIZED, "100%", name) for name in rounded)]
    for budget in config.budgets:
        for name, one in table.items():
            if isinstance(one, Rival):
                if task is None or one.applies(task):
                    found.append(Variant(name, budget))
            elif not one.keeps_all:
                stored = [each for each in config.slot_dtypes if each in exact or not one.layer_pairs]
                found += [Variant(name, budget, each) for each in stored]
    return found


def jobs(config: Config, records: Sequence[Record]) -> list[Job]:
    """What is missing in the records: model by model, samples before tasks, so that an interrupted run has all tasks."""
    finished = {record.group._replace(dtype="") for record in records}
    missing_jobs = []
    for model in config.models:
        for number in range(config.samples):
            for task in registry.chosen(config.tasks, config.data):
                for length in config.lengths if task.sized else (0,):
                    if task.count is not None and number >= task.count:
                        continue
                    keys = {each: RecordKey(model, task.name, length, number, 0, *each, "") for each in variants(config, task)}
                    missing = tuple(variant for variant, key in keys.items() if key not in finished)
                    if missing:
                        missing_jobs.append(Job(model, task.name, length, number, missing))
    return missing_jobs


@lru_cache(8)
def tasks_by_name(names: tuple[str, ...], data: tuple[str, ...]) -> dict[str, Task]:
    """The tasks that are named, and those of the files."""
    return {task.name: task for task in registry.chosen(names, data)}
