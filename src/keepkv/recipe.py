"""Recipe: every setting of a compression in one frozen value, with the defaults of the whole project.

The command line, the server, files, the evaluation and the library hand this value on; none of them has defaults of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from keepkv.budget import TOLERANCE, BudgetLike
from keepkv.errors import InputError, nearest

if TYPE_CHECKING:
    from keepkv.methods.base import Method

CHUNK = 2048  # tokens of a chunk, where a text is read in chunks
LONG = 8192  # tokens from which on it is, unless something else is asked for

RepeatMode = Literal["auto", "always", "never"]
BackingKind = Literal["cpu", "disk"]


@dataclass(frozen=True)
class Recipe:
    """How a text is compressed: what decides, beside the model and the text, what a compact cache holds.

    Args:
        budget: A share of the tokens (0.1, "10%"), slots per KV head on average (512), bytes for all rows ("64MB"), or
            "auto": the smallest budget within `tolerance`. A tuple has one for each row of a batch.
        method: A name from the table (`keepkv methods`), FILE.py:NAME, package.module:NAME, or a `Method`.
        slot_dtype: How the slots' keys and values are stored: "float" (as the model has them), "int8" or "int4".
        repeat: Whether the text is repeated over its own cache before it is compressed, so that details survive. "always"
            costs about one more reading, "never" nothing; "auto" repeats where that fits into the trained length.
        keep: Regular expressions; what they match stays verbatim in every head.
        tolerance: With budget "auto", the share of its output that a head may lose, between 0 and 1.
        chunk: Tokens read in one forward pass, compressing on the way. 0: all at once. None: by the length of the text.
        period: Tokens that may come after a compression before they are folded into the slots. None: any number.
        tail: The newest tokens, on top of the budget, that every compression leaves out.
        backing: Where the exact keys and values of all tokens are kept: "cpu", "disk", or None, nowhere.
        refresh: With a backing, the number of tokens after which the slots are rebuilt from it. None: never.
        references: Queries of each layer that are remembered, at most, for the next compression.
        seed: Of all that is drawn by chance.
        exact: Whether a document keeps every key and value beside the slots, so that joined documents can be repaired.

    Raises:
        InputError: for a `repeat` or a `backing` that is not one of those named.

    Example:
        >>> from dataclasses import replace
        >>> replace(Recipe(budget="5%"), slot_dtype="int4")
        Recipe(budget='5%', slot_dtype='int4')
    """

    budget: BudgetLike | tuple[BudgetLike, ...] = "10%"
    method: str | Method = "keepkv"
    slot_dtype: str = "float"
    repeat: RepeatMode = "auto"
    keep: tuple[str, ...] = ()
    tolerance: float = TOLERANCE
    chunk: int | None = None
    period: int | None = None
    tail: int = 0
    backing: BackingKind | None = None
    refresh: int | None = None
    references: int = 2048
    seed: int = 0
    exact: bool = False

    REPEAT_MODES: ClassVar[tuple[str, ...]] = ("auto", "always", "never")

    def __post_init__(self) -> None:
        if self.repeat not in self.REPEAT_MODES:
            raise InputError(f"repeat={self.repeat!r}: {nearest(str(self.repeat), self.REPEAT_MODES)}")
        if self.backing not in (None, "cpu", "disk"):
            raise InputError(f"backing {self.backing!r}: expected 'cpu', 'disk' or None")

    def __repr__(self) -> str:
        """What is not the default."""
        own = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value, default in own if value != default)})"

    @property
    def auto_budget(self) -> bool:
        """Whether the budget is to be found (see `tolerance`)."""
        return self.budget == "auto"

    @property
    def budget_text(self) -> str:
        """The budget in words; of several rows, one after the other."""
        return ", ".join(map(str, self.budget)) if isinstance(self.budget, tuple) else str(self.budget)

    @property
    def method_name(self) -> str:
        """The method's name."""
        return self.method if isinstance(self.method, str) else self.method.name

    def settled(self, tokens: int) -> Recipe:
        """For a text of so many tokens: read in chunks of CHUNK from LONG tokens on, if nothing else was asked for."""
        if self.chunk is not None:
            return self
        return replace(self, chunk=CHUNK if tokens > LONG and not self.auto_budget else 0)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for files: the budget in words, the method's name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "budget": self.budget_text, "method": self.method_name, "keep": list(self.keep)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Recipe:
        """From what `to_dict` made, in this keepkv or an older one. Raises KeyError or TypeError for anything else."""
        known = dict(values)
        if "reference" in known:  # files of format 3 and older
            known["repeat"] = {"auto": "auto", "context": "never", "recall": "always"}[known.pop("reference")]
            known["slot_dtype"] = known.pop("slots", "float")
        return Recipe(**{**known, "keep": tuple(known["keep"])})


CONVERSATION = Recipe(budget="1024", period=512, chunk=CHUNK)  # where nobody knows how long it gets
SERVER = Recipe(period=512)  # prompts of any length, answers of any length
