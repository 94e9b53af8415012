"""Statistics over pairs: means, differences and ratios with bootstrap intervals, and rankings only where intervals separate.

Several questions are asked of one text, and their answers are not independent: what is drawn is whole texts, with all their
questions. A text that stands in several groups (tasks) is drawn in all of them together; other groups are drawn on their own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
DIFFERENCE = (-1.0, 1.0)  # the limits of a difference of scores
LEVEL = 0.95
Cluster = Sequence[tuple[float, float]]  # numerator and denominator of each question of one text
Group = Sequence[Cluster] | Mapping[Hashable, Cluster]  # the texts of one task; a name is that of the same text everywhere


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

    @property
    def mirrored(self) -> Interval:
        """Of a difference: that of the second and the first."""
        return Interval(0.0 - self.value, 0.0 - self.high, 0.0 - self.low)


def combined(groups: Sequence[Group], limits: tuple[float, float] | None = (0.0, 1.0)) -> Interval | None:
    """Mean over groups of Σ numerators / Σ denominators, with a 95% percentile bootstrap.

    A group is a task, a cluster is one text with all its questions, and a mean is a ratio whose denominators are 1. With
    limits, whole clusters are drawn from the n texts and one more that nobody has seen: its ratio is uniform within the limits.
    So a few texts give a wide interval even if all agree, and one text says next to nothing. Without, only the n texts are, and
    the interval is expanded instead (see `tail`).

    Args:
        groups: For each task, for each text, (numerator, denominator) of each question.
        limits: The least and the largest value that a ratio can have; None if it has none.

    Returns:
        The interval; None if the denominators of all groups sum to 0 (a group whose denominators do is left out).
    """
    used = [group for group in groups if sum(y for cluster in _clusters(group) for _, y in cluster) > 0]
    if not used:
        return None
    ratios: list[float] = []
    means = np.zeros(DRAWS)
    strata = list(_strata(used))
    for stratum, draws in zip(strata, _drawn(tuple(len(stratum[0].sums) for stratum in strata), limits), strict=True):
        of_unseen = draws.of_unseen
        for texts in stratum:
            sums = texts.sums
            ratios.append(sums[:, 0].sum() / sums[:, 1].sum())
            unseen = draws.times_unseen * (sums[:, 1].sum() / texts.own)
            total = draws.times @ sums
            denominator = total[:, 1] + unseen
            resampled = (total[:, 0] + unseen * of_unseen) / np.where(denominator > 0, denominator, 1)
            means += np.where(denominator > 0, resampled, ratios[-1]) / len(used)
    value = float(np.mean(ratios))
    if limits:
        means = np.clip(means + value - means.mean(), *limits)  # the unseen text widens, and does not pull to the middle
        return _interval(value, means, (1 - LEVEL) / 2)
    return _interval(value, means, tail([len(stratum[0].sums) for stratum in strata]))


def ratio_of_means(groups: Sequence[Group]) -> Interval | None:
    """Mean numerator / mean denominator, with a 95% percentile bootstrap over texts.

    Each mean is one over groups of a mean over questions. So of one group it is Σ numerators / Σ denominators, and with the KL
    of two methods as numerator and denominator, it says how many times the first is as far from the full cache as the second.
    A divergence has no upper limit, so no unseen text is drawn, and the interval is expanded instead (see `tail`).

    Args:
        groups: For each task, for each text, (numerator, denominator) of each question.

    Returns:
        The interval; None if there is no question, or the denominators sum to 0.
    """
    used = [group for group in groups if any(len(cluster) for cluster in _clusters(group))]
    tops, bottoms = np.zeros(DRAWS), np.zeros(DRAWS)
    top = bottom = 0.0
    strata = list(_strata(used))
    for stratum, draws in zip(strata, _drawn(tuple(len(stratum[0].sums) for stratum in strata), None), strict=True):
        for texts in stratum:
            mean_top, mean_bottom, _ = texts.sums.sum(0) / texts.sums[:, 2].sum()
            total = draws.times @ texts.sums
            drawn = total[:, 2]
            tops += np.where(drawn > 0, total[:, 0] / np.where(drawn > 0, drawn, 1), mean_top)
            bottoms += np.where(drawn > 0, total[:, 1] / np.where(drawn > 0, drawn, 1), mean_bottom)
            top, bottom = top + float(mean_top), bottom + float(mean_bottom)
    if bottom <= 0:
        return None
    ratios = np.where(bottoms > 0, tops / np.where(bottoms > 0, bottoms, 1), top / bottom)
    return _interval(top / bottom, ratios, tail([len(stratum[0].sums) for stratum in strata]))


def tail(sizes: Sequence[int]) -> float:
    """The share of draws on each side of an interval, for strata of so many texts.

    2.5% of many; fewer where there are few, since a bootstrap's draws spread less than samples do, by √((n−1)/n), and since
    the spread itself is a guess, as in Student's t: Φ(−t √(n/(n−1))), the expanded percentile interval (Hesterberg 2015, arXiv
    1411.5279). t is its expansion in 1 / degrees of freedom (Abramowitz and Stegun 26.7.5).

    Example:
        >>> round(tail([20]), 3), round(tail([8]), 3)
        (0.016, 0.006)
    """
    n = sum(sizes)
    freedom = n - len(sizes)
    if freedom < 1:
        return 0.0
    normal = NormalDist()
    z = normal.inv_cdf((1 + LEVEL) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    t = z + sum(term / freedom**power for power, term in enumerate(terms, 1))
    return normal.cdf(-t * (n / freedom) ** 0.5)


def _interval(value: float, draws: NDArray[np.float64], outside: float) -> Interval:
    low, high = np.quantile(draws, [outside, 1 - outside])
    return Interval(round(value, 6), round(float(low), 6), round(float(high), 6))


class _Draws(NamedTuple):
    """How often each draw has each text, [DRAWS, texts], and the unseen one, [DRAWS]; and the unseen one's ratio, [DRAWS]."""

    times: NDArray[np.float64]
    times_unseen: NDArray[np.int64]
    of_unseen: NDArray[np.float64]


@lru_cache(64)
def _drawn(sizes: tuple[int, ...], limits: tuple[float, float] | None) -> list[_Draws]:
    """The draws of strata of so many texts: the same whenever they are asked for, and random only once."""
    rng = np.random.default_rng(0)
    strata = []
    for n in sizes:
        drawn = n + (limits is not None)  # the last one stands for the unseen text
        choices = rng.integers(0, drawn, (DRAWS, drawn))
        times = (choices[:, :, None] == np.arange(drawn)).sum(1)
        of_unseen = rng.uniform(*limits, DRAWS) if limits else np.zeros(DRAWS)
        unseen = times[:, n] if limits else np.zeros(DRAWS, dtype=np.int64)
        strata.append(_Draws(times[:, :n].astype(np.float64), unseen, of_unseen))
    return strata


class _Texts(NamedTuple):
    """A group's texts among those of its stratum: [texts, 3] with Σ numerators, Σ denominators, questions; how many it has."""

    sums: NDArray[np.float64]
    own: int


def _clusters(group: Group) -> list[Cluster]:
    return list(group.values() if isinstance(group, Mapping) else group)


def _strata(groups: Sequence[Group]) -> Iterator[list[_Texts]]:
    """Groups that are drawn together, since they have texts in common; most are alone."""
    named: list[Mapping[Hashable, Cluster]] = [
        group if isinstance(group, Mapping) else {(i, j): cluster for j, cluster in enumerate(group)}
        for i, group in enumerate(groups)
    ]
    waiting = list(range(len(named)))
    while waiting:
        members = [waiting.pop(0)]
        names = dict.fromkeys(named[members[0]])
        while common := [i for i in waiting if names.keys() & named[i].keys()]:
            members += common
            waiting = [i for i in waiting if i not in common]
            names |= dict.fromkeys(name for i in common for name in named[i])
        yield [_texts(named[i], list(names)) for i in sorted(members)]


def _texts(group: Mapping[Hashable, Cluster], names: Sequence[Hashable]) -> _Texts:
    clusters = [group.get(name, ()) for name in names]
    sums = [[sum(x for x, _ in c), sum(y for _, y in c), len(c)] for c in clusters]
    return _Texts(np.array(sums, dtype=float), len(group))


def ranks(names: Sequence[str], difference: Mapping[tuple[str, str], Interval]) -> dict[str, int]:
    """The rank of each name: 1 + the number of others that are significantly better.

    Args:
        names: What is ranked.
        difference: The paired differences, first minus second. Better is who has an interval above 0.
    """

    def times_beaten(name: str) -> int:
        return sum(difference[other, name].low > 0 for other in names if other != name and (other, name) in difference)

    return {name: 1 + times_beaten(name) for name in names}
