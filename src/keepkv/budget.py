"""Budgets: what a user allows, read once, and turned into a whole number of slots."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from keepkv.errors import BudgetError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from keepkv.slots.slot_dtype import Price

MIN_SLOTS = 4  # a KV head's least average: a sink, the newest tokens and one free choice
TOLERANCE = 0.03  # of `auto`: the share of its outputs that a head may lose
_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_EXPECTED = 'expected a share of the cache ("0.1", "10%"), a number of slots per KV head ("512") or bytes ("64MB", "64MiB")'


@dataclass(frozen=True)
class Budget:
    """What the user allows: a share of the full cache's bytes, a count of slots per KV head on average, or bytes.

    Args:
        kind: Which of the three.
        amount: The share (above 0, at most 1), the slots per KV head, or the bytes.
        text: As it was written, for reports and errors.
    """

    kind: Literal["fraction", "count", "bytes"]
    amount: float
    text: str

    def __str__(self) -> str:
        return self.text

    @staticmethod
    def parse(value: str | float | Budget) -> Budget:
        """Reads 0.1, "0.1", "10%", 512, "512", "1e3", "64MB" or "64MiB", numbers of NumPy and PyTorch too; a Budget passes.

        Raises:
            BudgetError: for anything else.

        Example:
            >>> Budget.parse("10%")
            Budget(kind='fraction', amount=0.1, text='10%')
        """
        if isinstance(value, Budget):
            return value
        text = str(value.item() if hasattr(value, "item") else value).strip()
        if text == "auto":
            raise BudgetError('a budget is found ("auto") only where one text is asked, with keepkv ask: give a budget')
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*(%|[kmg]?i?b)?", text, re.IGNORECASE)
        if match is None:
            raise BudgetError(f"budget {text!r} cannot be read: {_EXPECTED}")
        number = float(match[1] + (match[2] or ""))
        unit = (match[3] or "").upper()
        if not math.isfinite(number * _BYTES["GI"]):
            raise BudgetError(f"budget {text[:40]!r} is too large a number: {_EXPECTED}")
        if unit.endswith("B"):
            return Budget("bytes", number * _BYTES[unit[:-1]], text)
        exponent = (match[2] or "").lower().removeprefix("e")
        if unit == "%" or "." in match[1] or exponent.startswith("-"):
            fraction = number / 100 if unit == "%" else number
            if not 0 < fraction <= 1:
                raise BudgetError(f"budget {text!r} is outside its range: a fraction is above 0 and at most 1 (100%)")
            return Budget("fraction", fraction, text)
        return Budget("count", number, text)

    @staticmethod
    def parse_all(values: BudgetLike | Sequence[BudgetLike]) -> tuple[Budget, ...]:
        """One budget for all rows of a batch, or one for each. Raises BudgetError as `parse` does, and for no budget at all."""
        if is_single(values):
            return (Budget.parse(values),)
        if not len(values):
            raise BudgetError("no budget: give one for all rows, or one for each")
        return tuple(map(Budget.parse, values))

    def total_slots(self, tokens: int, heads: int, price: Price) -> int:
        """The slots that one sequence gets over all layers and KV heads, at most one for each token and head.

        A share, and bytes, buy as many slots as surely fit, whichever heads they go to; a share of 1 is every token. A share of
        a short sequence that comes to less than MIN_SLOTS per head is MIN_SLOTS per head (`is_raised`).

        Args:
            tokens: The sequence's length.
            heads: Layers × KV heads.
            price: Of a slot.

        Raises:
            BudgetError: if a count or bytes come to less than MIN_SLOTS per head, and the sequence has more tokens.

        Example:
            >>> from keepkv.slots.slot_dtype import SLOT_DTYPES
            >>> price = SLOT_DTYPES["int4"].price(64, 64, element=2)
            >>> Budget.parse("10%").total_slots(tokens=1000, heads=12, price=price)
            3899
        """
        total = self._slots(tokens, heads, price)
        least = min(MIN_SLOTS, tokens) * heads
        if total < least:
            if self.kind == "fraction":
                return least
            need = str(MIN_SLOTS) if self.kind == "count" else f"{(MIN_SLOTS * price.slot + price.head) * heads / 1e6:.2g}MB"
            raise BudgetError(
                f"budget {self.text!r} is {max(0, total) / heads:.2g} slots per KV head for {tokens} tokens, "
                f"fewer than the {MIN_SLOTS} that must be kept: give at least {need}"
            )
        return min(int(total + 1e-6), tokens * heads)

    def is_raised(self, tokens: int, heads: int, price: Price) -> bool:
        """Whether this share of so many tokens is less than must be kept, so that the least that must be is kept instead."""
        return self.kind == "fraction" and self._slots(tokens, heads, price) < min(MIN_SLOTS, tokens) * heads

    def _slots(self, tokens: int, heads: int, price: Price) -> float:
        """What is paid for, in slots over all layers and heads."""
        if self.kind == "count":
            return self.amount * heads
        if self.kind == "fraction" and self.amount == 1:
            return tokens * heads
        paid = self.amount if self.kind == "bytes" else self.amount * tokens * heads * price.token
        return (paid - heads * price.head) / price.slot


BudgetLike = str | float | Budget  # what `Budget.parse` reads


def is_single(values: BudgetLike | Sequence[BudgetLike]) -> TypeIs[BudgetLike]:
    """Whether this is one budget, a number of any library among them, and no sequence of budgets."""
    return isinstance(values, str | Budget) or not hasattr(values, "__len__") or getattr(values, "ndim", 1) == 0
