"""Task: how the samples of one kind are drawn and answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from keepkv.eval.measure import Host, Opened, questions
from keepkv.eval.sample import Draw, Sample

RULER = "RULER, arXiv 2404.06654"  # where several tasks come from


@dataclass(frozen=True)
class Task:
    """A row of the table. make: the number-th sample; open: reads it, and measures one variant after the other from there;
    by default it asks the sample's questions.

    sized: its texts have the length that is asked for; count: how many samples there are, if there is an end to them.
    """

    name: str
    summary: str
    source: str
    make: Callable[[Draw], Sample]
    open: Callable[[Host, Sample], Opened] = questions
    sized: bool = True
    count: int | None = None
