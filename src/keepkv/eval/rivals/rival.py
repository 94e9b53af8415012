"""Rival: what is no method of a cache, and stands in the same tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from keepkv.eval.measure import Measure, Setup, prepare_questions
from keepkv.eval.sample import Sample
from keepkv.eval.tasks.task import Task


def asks_about_a_text(task: Task) -> bool:
    """Whether a task's samples are a text and questions about it, rather than a continuation or a conversation."""
    return task.prepare is prepare_questions


@dataclass(frozen=True)
class Rival:
    """One rival of the cache methods.

    Args:
        name: What it is called among the methods at the command line.
        summary: One line about it.
        source: The paper or package that it comes from.
        prepare: Takes a sample, and returns what measures the rival at a recipe's budget. An `Outcome` says how many bytes
            were needed.
        applies: Whether it can be measured on a task. Where it cannot, it is not in the plan.
        check: Raises InputError if something that it needs is not installed.
    """

    name: str
    summary: str
    source: str
    prepare: Callable[[Setup, Sample], Measure]
    applies: Callable[[Task], bool] = asks_about_a_text
    check: Callable[[], None] = lambda: None
