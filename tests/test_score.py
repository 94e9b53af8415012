"""The shared scores."""

from __future__ import annotations

from helpers import observation
from keepkv import score
from keepkv.methods import keepkv_paper
from keepkv.types import Observation


def test_large_logits_do_not_overflow_the_scores() -> None:
    seen = observation()
    loud = Observation(100 * seen.keys, seen.values, seen.queries, seen.query_positions, seen.rotation, seen.scale)
    for rule in (keepkv_paper.moving_average, keepkv_paper.window_mean, score.pooled_window, keepkv_paper.weighted_window):
        assert not rule(loud).isnan().any()
