"""Scores of answers."""

from __future__ import annotations

import pytest

from keepkv.eval import metrics


def test_scores() -> None:
    assert metrics.f1("the Cat sat")("A cat sat down") == pytest.approx(2 * 2 / (3 + 2))
    assert metrics.exact("The cat.")("cat") == 1
    assert metrics.rouge_l("a b c d")("a x c d") == pytest.approx(0.75)
    assert metrics.last_number("1,200")("first 3, so 1200.") == 1
    assert metrics.numbers("Paragraph 7")("7 or 9") == 0.5
    assert metrics.all_of("x1", "x2", "x3", "x4")("X2 and x4") == 0.5
    person = metrics.fields({"name": "Ann", "born": "1950"})
    assert person('Sure: {"name": "ann", "born": "1951"}') == 0.5
    assert person('{"name": "Ann", "born": "1950", "age": "3"}') == person('{"name": "Ann", "born": 1950}') == person("{") == 0
