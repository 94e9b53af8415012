"""Method: one function for each step of a compression, what it must observe, and what a user should know of it."""

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
    """A compression method: one function for each step of `compress.py`, and what a user should know of it.

    Only a name, a summary, a paper and a score are needed. With the defaults for everything else, all heads get the same number
    of slots, each keeps the tokens of the best scores, among them the first 4 and the newest 32, and the others are dropped.
    Copy `snapkv.py` for a method of your own.

    In the shapes, L are layers, H KV heads, and T entries, which are tokens or slots of an earlier compression.

    Args:
        name: What users call it: small letters, words joined by "-".
        summary: What is kept, in a few words.
        paper: The paper's name for it, and its arXiv number.
        score: Observation -> float32 [H, T], how much each entry matters. +inf: it must stay. See `keepkv.score`.
        allot: (scores [L, H, T], slots in all) -> slots of every layer and head, `[L][H]`. See `keepkv.allot`.
        sinks: So many of the first tokens are always kept.
        recent: And so many of the newest ones. Below 1 it is a share of the slots.
        choose: (Observation, scores [H, T], slots [H]) -> a Choice for each head. See `keepkv.choose`.
        merge: (Observation, choices) -> a Merged for each head: what becomes of the other entries. `keepkv.merge.per_head`
            makes it out of a rule for one head.
        midway: The merge in the middle of a prompt that is repeated while it is read in chunks. None: the same.
        references: Observation -> References, the queries that the compact cache must answer, for methods that score by them or
            fit to them. See `keepkv.observe.references`.
        column_mass: Whether the attention of all queries must be summed while a text is read (`Observation.column_mass`).
        repeat: How the text is repeated before it is compressed, for methods that look at what this asks for.
        needs_projection: Whether the output projections of the layers are needed (`Observation.projection`).
        same_tokens_in_all_heads: Whether the heads of a layer keep the same tokens. The score then is the same for all of them,
            and `allot` sees one head of each layer.
        judged: Whether the merge measures its error on queries that are held out (`Merged.error`).
        trials: Slots per head, n and m > n, of two first compressions whose losses decide the allotment, of methods that name
            references. Empty: there are none.
        keeps_all: Whether every token is kept, whatever the budget.
        always_exact: Whether slots are stored as the model computes them, whatever the slot dtype.
        layer_pairs: How neighboring layers store their slots together. None: each for itself.
        cost: What it costs, for its page, as the next two.
        good: What it is good for.
        bad: What it is bad at.

    Example:
        >>> newest = Method("newest", "the newest tokens", "nobody's", score=lambda observation: observation.positions.float())
        >>> newest.sinks, newest.recent
        (4, 32)
    """

    name: str
    summary: str
    paper: str
    score: Callable[[Observation], Tensor]
    allot: allot.Allot = allot.uniform
    sinks: int = 4
    recent: int | float = 32
    choose: Callable[[Observation, Tensor, Sequence[int]], list[Choice]] = choose.top
    merge: Merge = evict
    midway: Merge | None = None
    references: Callable[[Observation], References] | None = None
    column_mass: bool = False
    repeat: Repeat | None = None
    needs_projection: bool = False
    same_tokens_in_all_heads: bool = False
    judged: bool = False
    trials: tuple[int, ...] = ()
    keeps_all: bool = False
    always_exact: bool = False
    layer_pairs: LayerPairs | None = None
    cost: str = ""
    good: str = ""
    bad: str = ""

    @property
    def in_the_middle(self) -> Method:
        """The method for the middle of a prompt that is repeated while it is read: with `midway` for `merge`."""
        return replace(self, merge=self.midway) if self.midway else self
