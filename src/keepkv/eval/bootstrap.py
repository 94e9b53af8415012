"""Statistics over pairs: means and differences with bootstrap intervals, and rankings only where intervals separate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000
DIFFERENCE = (-1.0, 1.0)  # the limits of a difference of scores
Cluster = Sequence[tuple[float, float]]  # numerator and denominator of each question of one text
LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate and the ends of its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def apart(self) -> bool:
        """Of a difference: 0 lies outside."""
        return self.low > 0 or self.high < 0


def combined(groups: Sequence[Sequence[Cluster]], limits: tuple[float, float] = (0.0, 1.0)) -> Interval | None:
    """Mean over groups (tasks) of Σ numerators / Σ denominators, with a percentile bootstrap.

    Whole clusters are drawn (the questions of one text), each within its group: of n + 1, one of which is a text that was not
    seen and may come to anything within the limits (uniform). So few texts, also if all agree, give a wide interval, and one
    text says next to nothing. A mean is a ratio whose denominators are 1. Groups whose denominators sum to 0 are left out;
    None where that leaves nothing.
    """
    sums = [np.array([[sum(x for x, _ in c), sum(y for _, y in c)] for c in clusters], dtype=float) for clusters in groups]
    sums = [each for each in sums if len(each) and each[:, 1].sum() > 0]
    if not sums:
        return None
    rng = np.random.default_rng(0)
    value = float(np.mean([each[:, 0].sum() / each[:, 1].sum() for each in sums]))
    drawn = np.zeros(DRAWS)
    for each in sums:
        n, usual = len(each), each[:, 1].mean()
        which = rng.integers(0, n + 1, (DRAWS, n + 1))
        unseen = (which == n).sum(1) * usual
        total = np.concatenate([each, [[0.0, 0.0]]])[which].sum(1)
        whole = total[:, 1] + unseen
        mean = (total[:, 0] + unseen * rng.uniform(*limits, DRAWS)) / np.where(whole > 0, whole, 1)
        drawn += np.where(whole > 0, mean, each[:, 0].sum() / each[:, 1].sum()) / len(sums)
    drawn = np.clip(drawn + value - drawn.mean(), *limits)  # the unseen text widens, and does not pull to the middle
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(round(value, 6), round(float(low), 6), round(float(high), 6))


def ranks(names: Sequence[str], difference: Mapping[tuple[str, str], Interval]) -> dict[str, int]:
    """1 + how many others are better beyond the interval of the paired difference (first minus second)."""

    def beaten(name: str) -> int:
        return sum(difference[other, name].low > 0 for other in names if other != name and (other, name) in difference)

    return {name: 1 + beaten(name) for name in names}
