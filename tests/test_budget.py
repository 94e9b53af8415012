"""Budgets: how they are written, what they resolve to, and which are refused."""

from __future__ import annotations

import pytest

from keepkv.budget import Budget
from keepkv.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "slots"),
    [("0.1", 2000), ("10%", 2000), (0.1, 2000), ("1e-1", 2000), ("512", 10240), (512, 10240), ("64kB", 640), ("64KiB", 655),
     ("0.5MB", 5000), ("100%", 20000), ("1.0", 20000), (1.0, 20000), ("5000", 20000), ("9GB", 20000)],
)  # fmt: skip
def test_budgets_are_read_and_resolved(text: str | float, slots: int) -> None:
    assert Budget.parse(text).total_slots(tokens=1000, heads=20, slot_bytes=100) == slots


@pytest.mark.parametrize("text", ["", "ten", "-1", "0.0", "0%", "101%", "1.5", "5 apples", "nan", "inf", "0x10", "1,5"])
def test_unreadable_budgets_are_refused(text: str) -> None:
    with pytest.raises(BudgetError):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0.001", "3", "1kB", "0"])
def test_budgets_below_what_must_be_kept_are_refused_with_the_least_that_works(text: str) -> None:
    with pytest.raises(BudgetError, match="give at least") as caught:
        Budget.parse(text).total_slots(tokens=1000, heads=20, slot_bytes=100)
    least = str(caught.value).rsplit(" ", 1)[1]
    assert Budget.parse(least).total_slots(tokens=1000, heads=20, slot_bytes=100) >= 4 * 20
