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
        """Of a difference: whether 0 lies outside."""
        return self.low > 0 or self.high < 0


def combined(groups: Sequence[Sequence[Cluster]], limits: tuple[float, float] = (0.0, 1.0)) -> Interval | None:
    """Mean over groups of Σ numerators / Σ denominators, with a 95% percentile bootstrap.

    A group is a task, a cluster is one text with all its questions, and a mean is a ratio whose denominators are 1. Whole
    clusters are drawn, each within its group, from the n texts and one more that nobody has seen: its ratio is uniform within
    the limits. So a few texts give a wide interval even if all agree, and one text says next to nothing.

    Args:
        groups: For each task, for each text, (numerator, denominator) of each question.
        limits: The least and the largest value that a ratio can have.

    Returns:
        The interval; None if the denominators of all groups sum to 0 (a group whose denominators do is left out).
    """
    sums = [np.array([[sum(x for x, _ in c), sum(y for _, y in c)] for c in clusters], dtype=float) for clusters in groups]
    sums = [texts for texts in sums if len(texts) and texts[:, 1].sum() > 0]
    if not sums:
        return None
    rng = np.random.default_rng(0)
    ratios = [texts[:, 0].sum() / texts[:, 1].sum() for texts in sums]
    value = float(np.mean(ratios))
    means = np.zeros(DRAWS)
    for texts, ratio in zip(sums, ratios, strict=True):
        n = len(texts)
        mean_denominator = texts[:, 1].mean()
        choices = rng.integers(0, n + 1, (DRAWS, n + 1))  # n stands for the unseen text
        unseen = (choices == n).sum(1) * mean_denominator
        total = np.concatenate([texts, [[0.0, 0.0]]])[choices].sum(1)
        denominator = total[:, 1] + unseen
        resampled = (total[:, 0] + unseen * rng.uniform(*limits, DRAWS)) / np.where(denominator > 0, denominator, 1)
        means += np.where(denominator > 0, resampled, ratio) / len(sums)
    means = np.clip(means + value - means.mean(), *limits)  # the unseen text widens, and does not pull to the middle
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(round(value, 6), round(float(low), 6), round(float(high), 6))


def ranks(names: Sequence[str], difference: Mapping[tuple[str, str], Interval]) -> dict[str, int]:
    """The rank of each name: 1 + the number of others that are significantly better.

    Args:
        names: What is ranked.
        difference: The paired differences, first minus second. Better is who has an interval above 0.
    """

    def times_beaten(name: str) -> int:
        return sum(difference[other, name].low > 0 for other in names if other != name and (other, name) in difference)

    return {name: 1 + times_beaten(name) for name in names}
