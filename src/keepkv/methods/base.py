"""Method: one row of the table: a function per axis, what it must observe, its paper, and what a user should know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from keepkv import allot, choose
from keepkv.merge.per_head import Merge, evict
from keepkv.observe.repetition import Repeat
from keepkv.slots.layer_pairs import LayerPairs
from keepkv.types import Choice, Observation, References


@dataclass(frozen=True)
class Method:
    """One row of the table: observe (references, column_mass, repeat), score, allot, choose (sinks, recent, choose), merge.

    cost, good and bad are for its page: what it costs, what it is good for, what it is bad at.
    """

    name: str
    summary: str
    paper: str
    score: Callable[[Observation], Tensor]
    allot: Callable[[Tensor, int], list[list[int]]] = allot.uniform
    sinks: int = 4  # first tokens that are always kept
    recent: int | float = 32  # newest tokens that are always kept; below 1, a share of the slots
    choose: Callable[[Observation, Tensor, Sequence[int]], list[Choice]] = choose.top
    merge: Merge = evict
    midway: Merge | None = None  # how, in the middle of a prompt that is repeated, if otherwise
    references: Callable[[Observation], References] | None = None
    column_mass: bool = False  # all queries' attention must be summed while reading
    repeat: Repeat | None = None  # how the text is repeated, for methods that use what that asks for
    judged: bool = False  # measures its own error on held-out queries
    trial: int = 0  # slots per head of a first compression whose errors, if judged, correct the budgets
    keeps_all: bool = False  # whatever the budget
    layer_pairs: LayerPairs | None = None  # neighbouring layers store their slots together
    cost: str = ""
    good: str = ""
    bad: str = ""

    @property
    def in_the_middle(self) -> Method:
        """The row for the middle of a prompt that is repeated while it is read."""
        return replace(self, merge=self.midway) if self.midway else self
