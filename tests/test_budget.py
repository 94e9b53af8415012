"""Budgets: how they are written, what they resolve to, and which are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from keepkv.budget import Budget
from keepkv.errors import BudgetError
from keepkv.slots.slot_dtype import SLOT_DTYPES, Price

PRICE = Price(slot=100.0, head=0.0, token=100)


@pytest.mark.parametrize(
    ("text", "slots"),
    [("0.1", 2000), ("10%", 2000), (0.1, 2000), ("1e-1", 2000), ("512", 10240), (512, 10240), ("64kB", 640), ("64KiB", 655),
     ("0.5MB", 5000), ("1e2", 2000), ("1e+2", 2000), ("0.001", 80), ("100%", 20000), ("1.0", 20000), (1.0, 20000),
     ("5000", 20000), ("9GB", 20000)],
)  # fmt: skip
def test_budgets_are_read_and_resolved(text: str | float, slots: int) -> None:
    assert Budget.parse(text).total_slots(tokens=1000, heads=20, price=PRICE) == slots


def test_a_budget_to_be_found_is_refused_with_a_word_why() -> None:
    with pytest.raises(BudgetError, match="only where one text is asked"):
        Budget.parse("auto")


@pytest.mark.parametrize("text", ["", "ten", "-1", "0.0", "0%", "101%", "1.5", "5 apples", "nan", "inf", "0x10", "1,5"])
def test_unreadable_budgets_are_refused(text: str) -> None:
    with pytest.raises(BudgetError):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["3", "1kB", "0"])
def test_budgets_below_what_must_be_kept_are_refused_with_the_least_that_works(text: str) -> None:
    with pytest.raises(BudgetError, match="give at least") as caught:
        Budget.parse(text).total_slots(tokens=1000, heads=20, price=PRICE)
    least = str(caught.value).rsplit(" ", 1)[1]
    assert Budget.parse(least).total_slots(tokens=1000, heads=20, price=PRICE) >= 4 * 20


def test_a_share_of_a_short_text_is_raised_to_the_least_that_must_be_kept() -> None:
    assert [Budget.parse("10%").total_slots(tokens, 20, PRICE) for tokens in (0, 1, 4, 26, 40, 50)] == [0, 20, 80, 80, 80, 100]
    assert [Budget.parse("10%").is_raised(tokens, 20, PRICE) for tokens in (0, 1, 26, 39, 40)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert not Budget.parse("512").is_raised(26, 20, PRICE)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)])
def test_numbers_of_other_libraries_are_numbers(number: object) -> None:
    assert Budget.parse(number).kind == "fraction"
    assert Budget.parse_all(number) == (Budget.parse(number),)
    assert Budget.parse_all([number, 512])[1].kind == "count"
    assert Budget.parse(np.int64(512)).kind == Budget.parse(torch.tensor(512)).kind == "count"


@pytest.mark.parametrize("name", SLOT_DTYPES)
@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("size", [64, 80, 128])
def test_a_share_is_one_of_bytes(name: str, element: int, size: int) -> None:
    """As many slots as surely fit, and no more than two slots of every head fewer; never more than there are tokens."""
    heads, tokens = 12, 3000
    price = SLOT_DTYPES[name].price(size, size, element)
    for share in (0.02, 0.1, 0.3, 0.5):
        slots = Budget.parse(share).total_slots(tokens, heads, price)
        paid = share * tokens * heads * price.token
        assert slots * price.slot + heads * price.head <= paid or slots == 4 * heads
        assert slots == min(tokens * heads, max(4 * heads, int((paid - heads * price.head) / price.slot + 1e-6)))
    assert Budget.parse("100%").total_slots(tokens, heads, price) == tokens * heads


def test_a_share_of_a_cache_in_another_dtype_buys_what_its_bytes_buy() -> None:
    """A model that runs in float32, its cache counted in bfloat16: the share buys half as many float32 slots."""
    full, counted = (SLOT_DTYPES["float"].price(64, 64, 4, of) for of in (4, 2))
    slots = [Budget.parse("10%").total_slots(2000, 10, price) for price in (full, counted)]
    assert slots == [int(200 * 512 / 520 * 10), int(200 * 256 / 520 * 10)]
