"""Task: how the samples of one kind are drawn and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from keepkv.eval.measure import Measure, Setup, prepare_questions
from keepkv.eval.sample import Draw, Sample

RULER = "RULER, arXiv 2404.06654"  # where several tasks come from


@dataclass(frozen=True)
class Task:
    """One task of the evaluation.

    Args:
        name: What it is called at the command line.
        summary: One line about it.
        source: The paper that it comes from, or "".
        make: Draws a sample; `Draw.number` says which one.
        prepare: Reads a sample, and returns what measures one method at one budget from there. By default it asks the
            sample's questions.
        sized: Whether its texts have the length that is asked for.
        count: How many samples there are; None where they never end.
    """

    name: str
    summary: str
    source: str
    make: Callable[[Draw], Sample]
    prepare: Callable[[Setup, Sample], Measure] = prepare_questions
    sized: bool = True
    count: int | None = None


def twice(
    name: str,
    summary: str,
    make: Callable[..., Sample],
    prepare: Callable[[Setup, Sample], Measure] = prepare_questions,
    source: str = "",
) -> tuple[Task, Task]:
    """A task with plain questions, and the same with paraphrased ones."""
    other = f"{summary}; asked in other words"
    return (
        Task(name, summary, source, make, prepare),
        Task(f"{name}-paraphrased", other, source, partial(make, paraphrased=True), prepare),
    )
