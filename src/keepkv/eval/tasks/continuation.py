"""Tasks without questions: prose is read, and what the model would write next is compared with the full cache's."""

from __future__ import annotations

from functools import partial

from keepkv.eval import drift, measure
from keepkv.eval.sample import Draw, Question, Sample, joined
from keepkv.eval.tasks.task import Task


def prose(draw: Draw, more: int = 0) -> Sample:
    """Prose alone, with so many tokens more than the length."""
    lines = draw.prose.stretch(draw.rng, draw.tokens + more, draw.number)
    return Sample(joined(lines), (Question("", "", lambda answer: 0.0),))


TASKS = (
    Task(
        "fidelity",
        "the next-token distributions over a text's true continuation",
        "",
        partial(prose, more=measure.CONTINUATION),
        measure.prepare_continuation,
    ),
    Task("drift", "what 2,000 written tokens do to a live cache: KL and repetition", "", prose, drift.prepare_drift),
)
