"""Spans: every token is in one of them, and no more comes back than is allowed."""

from __future__ import annotations

import random

import pytest

from keepkv import InputError
from keepkv.lookback.spans import LEFT, RIGHT, allowed, count, difference, in_turn, tiles, united
from keepkv.recipe import SPAN


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 128, 1000])
def test_every_token_is_in_exactly_one_span(tokens: int) -> None:
    assert [token for first, last in tiles(tokens) for token in range(first, last)] == list(range(tokens))
    assert all(0 < last - first <= SPAN for first, last in tiles(tokens))


def test_no_more_comes_back_than_is_allowed_and_the_best_span_always_does() -> None:
    rng = random.Random(0)
    for _ in range(300):
        tokens = rng.randrange(1, 2000)
        numbers = list(range(len(tiles(tokens))))
        rng.shuffle(numbers)
        allowance = rng.randrange(SPAN, 600)
        spans = allowed(numbers, tokens, allowance)
        assert count(spans) <= allowance
        assert spans == united(spans)
        assert all(0 <= first < last <= tokens for first, last in spans)
        best_first, best_last = tiles(tokens)[numbers[0]]
        assert any(first <= best_first and best_last <= last for first, last in spans)


def test_a_span_brings_more_of_what_follows_it() -> None:
    assert allowed([5], 1000, 128) == [(5 * SPAN - LEFT, 6 * SPAN + RIGHT)]
    assert allowed([0], 1000, 128) == [(0, SPAN + RIGHT)]
    assert allowed([5], 1000, 127) == [(5 * SPAN, 6 * SPAN)]


def test_neighbors_share_what_is_around_them() -> None:
    assert allowed([5, 6], 1000, 192) == [(5 * SPAN - LEFT, 7 * SPAN + RIGHT)]


def test_less_than_a_span_is_refused() -> None:
    with pytest.raises(InputError, match="at least 64 tokens"):
        allowed([0], 1000, 63)


def test_rankings_take_turns() -> None:
    assert in_turn([3, 1, 2], []) == [3, 1, 2]
    assert in_turn([3, 1, 2], [9, 3]) == [3, 9, 1, 2]
    assert in_turn() == []


def test_a_question_s_own_words_are_what_the_template_does_not_say() -> None:
    assert difference([1, 2, 7, 8, 3], [1, 2, 3]) == (2, 4)
    assert difference([5, 6], [1, 2, 3]) == (0, 2)
    assert difference([1, 2, 2, 3], [1, 2, 3]) == (2, 3)
    assert difference([1, 2, 3], [1, 2, 3]) == (0, 3), "without any words all of it asks"
    assert difference([], [1]) == (0, 0)
