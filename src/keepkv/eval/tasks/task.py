"""Task: how the samples of one kind are drawn and answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from keepkv.eval.sample import Draw, Sample

if TYPE_CHECKING:
    from keepkv.eval.measure import Host, Opened


@dataclass(frozen=True)
class Task:
    """A row of the table. make: the number-th sample; open: reads it, and measures one variant after the other from there.

    sized: its texts have the length that is asked for; count: how many samples there are, if there is an end to them.
    """

    name: str
    summary: str
    source: str
    make: Callable[[Draw], Sample]
    open: Callable[[Host, Sample], Opened]
    sized: bool = True
    count: int | None = None
