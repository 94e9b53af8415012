"""Capped logits and sinks, against their definition in float64."""

from __future__ import annotations

import pytest
import torch

from helpers import randn64
from keepkv.ops.softmax import PLAIN, Softmax, log_total, shares


def test_without_cap_and_sinks_nothing_changes() -> None:
    logits = randn64(2, 3, 7)
    assert PLAIN.plain
    assert PLAIN.capped(logits) is logits
    assert PLAIN.of_groups(2) is None
    torch.testing.assert_close(shares(logits), logits.softmax(-1), rtol=0, atol=0)


@pytest.mark.parametrize("level", [-50.0, 0.0, 50.0])
def test_a_sink_is_one_more_logit_without_a_value(level: float) -> None:
    logits, sinks = randn64(2, 3, 5, 7), randn64(6, seed=1) + level
    softmax = Softmax(sinks=sinks)
    of_rows = softmax.of_rows(2, 15).view(2, 3, 5)
    torch.testing.assert_close(of_rows, sinks.view(2, 3, 1).expand(2, 3, 5))
    wide = torch.cat([logits, of_rows[..., None]], -1)
    torch.testing.assert_close(shares(logits, of_rows), wide.softmax(-1)[..., :-1])
    torch.testing.assert_close(log_total(logits, of_rows), wide.logsumexp(-1))
    torch.testing.assert_close(softmax.of_head(2, 1, 2).sinks, sinks[5])


def test_a_cap_keeps_small_logits_and_bounds_large_ones() -> None:
    logits = torch.tensor([-1e6, -0.01, 0.0, 0.01, 1e6], dtype=torch.float64)
    capped = Softmax(cap=50.0).capped(logits)
    torch.testing.assert_close(capped, 50 * torch.tanh(logits / 50))
    assert capped.abs().max() <= 50


def test_rows_that_see_nothing_give_everything_to_the_sink() -> None:
    nothing = torch.full((1, 4), -torch.inf, dtype=torch.float64)
    assert shares(nothing, torch.zeros(1, dtype=torch.float64)).sum() == 0
