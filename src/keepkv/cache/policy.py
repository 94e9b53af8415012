"""Policy: what a cache's next compression goes by: a recipe's budget, method and storage, read and looked up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from keepkv import methods
from keepkv.budget import MIN_SLOTS, Budget, BudgetLike
from keepkv.methods import Method
from keepkv.recipe import Recipe
from keepkv.slots.slot_dtype import AUTO, AUTO_FORMATS, FLOAT, Price, SlotDtype, slot_dtype_of

if TYPE_CHECKING:
    from keepkv.cache.layer import KeepLayer


@dataclass(frozen=True)
class Policy:
    """What the next compression goes by.

    Attributes:
        budgets: One for all rows of a batch, or one for each.
        method: Looked up in the table.
        slot_dtype: How the user wants slots stored; see `stored_as`.
        full_dtype: In which the full cache is counted. None: as the model runs.
        spans: Tokens (first, last + 1) that keep a slot in every head.
    """

    budgets: tuple[Budget, ...]
    method: Method
    slot_dtype: SlotDtype = FLOAT
    full_dtype: torch.dtype | None = None
    spans: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(
        budget: BudgetLike | Sequence[BudgetLike], method: str | Method, slot_dtype: str, full_dtype: str = Recipe.full_dtype
    ) -> Policy:
        """From what a user gave. Raises BudgetError, MethodError, InputError for what cannot be read."""
        full = None if full_dtype == "auto" else getattr(torch, full_dtype)
        return Policy(Budget.parse_all(budget), methods.get(method), slot_dtype_of(slot_dtype), full)

    def changed(
        self,
        budget: BudgetLike | Sequence[BudgetLike] | None = None,
        method: str | Method | None = None,
        slot_dtype: str | None = None,
        spans: Sequence[tuple[int, int]] = (),
    ) -> Policy:
        """The policy with the given settings in place of its own, and with more spans. Raises as `of` does."""
        return replace(
            self,
            budgets=self.budgets if budget is None else Budget.parse_all(budget),
            method=self.method if method is None else methods.get(method),
            slot_dtype=self.slot_dtype if slot_dtype is None else slot_dtype_of(slot_dtype),
            spans=(*self.spans, *spans),
        )

    @property
    def stored_as(self) -> SlotDtype:
        """How slots are stored: not as the user wants for a method that is always exact. AUTO: it is still to be found.

        A method that keeps every token saves only by rounding, so auto is the fewest bits for it.
        """
        if self.method.always_exact or (self.method.layer_pairs and self.slot_dtype == AUTO):
            return FLOAT
        if self.method.keeps_all and self.slot_dtype == AUTO:
            return AUTO_FORMATS[-1]
        return self.slot_dtype

    @property
    def budget_text(self) -> str:
        """The budgets in words."""
        return ", ".join(map(str, self.budgets))

    def note(self, tokens: Sequence[int], layers: Sequence[KeepLayer]) -> str:
        """What a report should say of the budget of rows of so many tokens; nothing as a rule."""
        budgets = self.budgets * len(tokens) if len(self.budgets) == 1 else self.budgets
        heads, price = sum(layer.heads for layer in layers), self._price(layers)
        raised = [(b, n) for b, n in zip(budgets, tokens, strict=False) if b.is_raised(n, heads, price)]
        if not raised or self.method.keeps_all:
            return ""
        budget, count = raised[0]
        return (
            f"{budget} of {count:,} tokens is fewer than the {MIN_SLOTS} slots per KV head that must be kept: {MIN_SLOTS} are"
        )

    def price(self, size: int, element: int) -> Price:
        """What a slot costs, and a token of the full cache, of keys and values of `size` numbers of `element` bytes.

        Of slot_dtype "auto" it is the price of what a live cache takes.
        """
        slot_dtype = AUTO_FORMATS[0] if self.stored_as == AUTO else self.stored_as
        return slot_dtype.price(size, size, element, self.full_dtype.itemsize if self.full_dtype else element)

    def _price(self, layers: Sequence[KeepLayer]) -> Price:
        """The same, of these layers."""
        return layers[0].price(self.stored_as, self.full_dtype)

    def rows(self, which: Sequence[int]) -> Policy:
        """The policy of the given rows, in that order."""
        return replace(self, budgets=tuple(self.budgets[row] for row in which)) if len(self.budgets) > 1 else self

    def total_slots(self, row: int, tokens: int, layers: Sequence[KeepLayer]) -> int:
        """The budget of one row of `tokens` tokens, in slots over all layers and heads. Raises BudgetError."""
        heads = sum(layer.heads for layer in layers)
        if self.method.keeps_all:
            return tokens * heads
        budget = self.budgets[row if len(self.budgets) > 1 else 0]
        price = self._price(layers)
        if budget.kind == "bytes" and len(self.budgets) == 1:  # they are for the whole cache: the rows share them
            rows = len(layers[0].keys)
            price = price._replace(slot=price.slot * rows, head=price.head * rows)
        return budget.total_slots(tokens, heads, price)
