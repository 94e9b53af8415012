"""Statistics over pairs: means and differences with bootstrap intervals, and rankings only where intervals separate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000
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


def combined(groups: Sequence[Sequence[Sequence[tuple[float, float]]]]) -> Interval | None:
    """Mean over groups (tasks) of Σ numerators / Σ denominators, with a percentile bootstrap.

    Whole clusters are drawn (the questions of one text), each within its group. A mean is a ratio whose denominators are 1.
    Groups whose denominators sum to 0 are left out; None where that leaves nothing.
    """
    sums = [np.array([[sum(x for x, _ in c), sum(y for _, y in c)] for c in clusters], dtype=float) for clusters in groups]
    sums = [each for each in sums if len(each) and each[:, 1].sum() > 0]
    if not sums:
        return None
    rng = np.random.default_rng(0)
    value = float(np.mean([each[:, 0].sum() / each[:, 1].sum() for each in sums]))
    drawn = np.zeros(DRAWS)
    for each in sums:
        total = each[rng.integers(0, len(each), (DRAWS, len(each)))].sum(1)
        whole = each[:, 0].sum() / each[:, 1].sum()
        drawn += np.where(total[:, 1] > 0, total[:, 0] / np.where(total[:, 1] > 0, total[:, 1], 1), whole) / len(sums)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(round(value, 6), round(float(low), 6), round(float(high), 6))


def ranks(names: Sequence[str], difference: Mapping[tuple[str, str], Interval]) -> dict[str, int]:
    """1 + how many others are better beyond the interval of the paired difference (first minus second)."""

    def beaten(name: str) -> int:
        return sum(difference[other, name].low > 0 for other in names if other != name and (other, name) in difference)

    return {name: 1 + beaten(name) for name in names}
