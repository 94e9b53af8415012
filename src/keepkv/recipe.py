"""Recipe: every setting of a compression in one frozen value, with the defaults of the whole project.

The command line, the server, files, the evaluation and the library hand this value on. None of them has defaults of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from keepkv import schema
from keepkv.budget import TOLERANCE, BudgetLike
from keepkv.errors import InputError, nearest

if TYPE_CHECKING:
    from keepkv.methods.base import Method

CHUNK = 2048  # tokens of a chunk, where a text is read in chunks
LONG = 8192  # texts of more tokens than this are read in chunks, unless the recipe says otherwise

RepeatMode = Literal["auto", "always", "never"]
BackingKind = Literal["cpu", "disk"]
LookbackMode = Literal["auto", "off"] | int
SPAN = 64  # tokens of the spans that are looked back at


def lookback_of(text: str) -> LookbackMode:
    """`Recipe.lookback` as it is typed. Raises InputError.

    Example:
        >>> lookback_of("auto"), lookback_of("512")
        ('auto', 512)
    """
    mode: Any = int(text) if text.isdecimal() else text
    return Recipe(lookback=mode).lookback


@dataclass(frozen=True)
class Recipe:
    """How a text is compressed: everything that decides, beside the model and the text, what a compact cache holds.

    Args:
        budget: What the cache may hold. A share of the full cache's bytes (0.1, "10%"), slots per KV head on average (512),
            bytes for all rows ("64MB"), or "auto": the smallest budget within `tolerance`. A tuple has one for each row of a
            batch.
        method: A name from the table (`keepkv methods`), FILE.py:NAME, package.module:NAME, or a `Method`.
        slot_dtype: How the slots' keys and values are stored: "float" (in the model's dtype), "bfloat16",
            "int8", "int4", "int2" (integers, keys by channel and values by vector), or "auto": int8 or int4, whichever loses
            less on held-out queries (a live cache, a count of slots, and methods that hold none out: int8).
        repeat: Whether the text is repeated over its own cache before it is compressed, so that details survive. "always"
            costs about one more reading, "never" costs nothing, and "auto" repeats where that fits into the trained length.
        keep: Regular expressions. What they match in the text stays verbatim in every head.
        tolerance: With budget "auto", the share of its output that a head may lose, between 0 and 1.
        chunk: Tokens read in one forward pass; the cache is compressed on the way. 0: all at once. None: by the text's length.
        period: Tokens that may come after a compression before they are folded into the slots. None: any number.
        tail: How many of the newest tokens every compression leaves out, on top of the budget.
        backing: Where the exact keys and values of all tokens are kept: "cpu", "disk", or None, nowhere.
        refresh: With a backing, the number of tokens after which the slots are rebuilt from it. None: never.
        references: How many of each layer's queries are remembered, at most, for the next compression.
        seed: Of everything that is drawn at random.
        exact: Whether a document keeps every key and value beside the slots, so that joined documents can be repaired.
        full_dtype: The dtype in which the full cache is counted, for shares and ratios: "float32", "bfloat16", "float16", or
            "auto", that in which the model runs.
        lookback: How many tokens of the text may come back, exactly, for each question, beside the slots: a number, "auto"
            (256, or 512 for texts of more than 4,000 tokens), or "off".

    Raises:
        InputError: for a `repeat`, `full_dtype`, `backing` or `lookback` that is none of those named, and for a `keep` that is
            one string.

    Examples:
        >>> from dataclasses import replace
        >>> replace(Recipe(budget="5%"), slot_dtype="int4")
        Recipe(budget='5%', slot_dtype='int4')
    """

    budget: BudgetLike | tuple[BudgetLike, ...] = "10%"
    method: str | Method = "keepkv"
    slot_dtype: str = "auto"
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
    full_dtype: str = "auto"
    lookback: LookbackMode = "off"

    REPEAT_MODES: ClassVar[tuple[str, ...]] = ("auto", "always", "never")
    FULL_DTYPES: ClassVar[tuple[str, ...]] = ("auto", "float32", "bfloat16", "float16")

    def __post_init__(self) -> None:
        if self.repeat not in self.REPEAT_MODES:
            raise InputError(f"repeat={self.repeat!r}: {nearest(str(self.repeat), self.REPEAT_MODES)}")
        if self.full_dtype not in self.FULL_DTYPES:
            raise InputError(f"full_dtype={self.full_dtype!r}: {nearest(str(self.full_dtype), self.FULL_DTYPES)}")
        if self.backing not in (None, "cpu", "disk"):
            raise InputError(f"backing {self.backing!r}: expected 'cpu', 'disk' or None")
        if self.lookback not in ("auto", "off") and not (isinstance(self.lookback, int) and self.lookback >= SPAN):
            raise InputError(f"lookback={self.lookback!r}: expected 'auto', 'off' or at least {SPAN} tokens")
        if isinstance(self.keep, str):  # its characters would be taken for regular expressions
            raise InputError(f"keep={self.keep!r}: expected several regular expressions, as in keep=({self.keep!r},)")

    def __repr__(self) -> str:
        """The settings that are not the default."""
        settings = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value, default in settings if value != default)})"

    @property
    def auto_budget(self) -> bool:
        """Whether the budget is still to be found, see `tolerance`."""
        return self.budget == "auto"

    @property
    def budget_text(self) -> str:
        """The budget in words; several rows' budgets with commas between them."""
        return ", ".join(map(str, self.budget)) if isinstance(self.budget, tuple) else str(self.budget)

    @property
    def method_name(self) -> str:
        """The method's name."""
        return self.method if isinstance(self.method, str) else self.method.name

    def refuse(self, user: str, *names: str) -> None:
        """Raises InputError if a setting that `user` would ignore is not the default."""
        for name in names:
            if getattr(self, name) != getattr(Recipe, name):
                raise InputError(f"{name}={getattr(self, name)!r} has no effect on {user}: leave the setting out")

    def settled(self, tokens: int) -> Recipe:
        """The recipe for a text of so many tokens: `chunk` is CHUNK if there are more than LONG, unless it is set already."""
        if self.chunk is not None:
            return self
        return replace(self, chunk=CHUNK if tokens > LONG and not self.auto_budget else 0)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, for files: the budget in words, the method's name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "budget": self.budget_text, "method": self.method_name, "keep": list(self.keep)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Recipe:
        """The recipe of what `to_dict` returned, in this keepkv or an older one.

        Raises:
            ValueError: for anything else.
        """
        settings = dict(values)
        if "reference" in settings:  # files of format 3 and older
            older = {"auto": "auto", "context": "never", "recall": "always"}
            settings["repeat"] = older.get(schema.text(settings.pop("reference")))
            settings["slot_dtype"] = settings.pop("slots", "float")
        unknown = settings.keys() - {field.name for field in fields(Recipe)}
        if unknown or not {"budget", "method", "keep"} <= settings.keys():
            raise ValueError("these are not the settings of a recipe")
        checked = {name: _READ.get(name, schema.text)(value) for name, value in settings.items()}
        try:
            return Recipe(**checked)
        except InputError as error:
            raise ValueError(str(error)) from error


def _count(value: object) -> int | None:
    return None if value is None else schema.whole(value)


# How the settings of a file are read; those that are not named here are texts
_READ: dict[str, Callable[[Any], Any]] = {
    "budget": lambda value: value if isinstance(value, str) else schema.number(value, 0),
    "keep": lambda value: tuple(map(schema.text, schema.sequence(value))),
    "tolerance": schema.number,
    "chunk": _count,
    "period": _count,
    "tail": schema.whole,
    "backing": lambda value: None if value is None else schema.text(value),
    "refresh": _count,
    "references": schema.whole,
    "seed": lambda value: schema.whole(value, -(2**63), 2**64),
    "exact": schema.flag,
    "lookback": lambda value: value if isinstance(value, str) else schema.whole(value),
}

CONVERSATION = Recipe(budget="1024", period=512, chunk=CHUNK)  # of any length, so the budget is no share of it
SERVER = Recipe(period=512)  # prompts of any length, answers of any length
