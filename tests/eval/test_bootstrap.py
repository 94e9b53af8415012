"""Bootstrap intervals."""

from __future__ import annotations

from itertools import product
from statistics import NormalDist

import numpy as np
import pytest

from keepkv.eval.bootstrap import Interval, combined, ratio_of_means, tail


def test_a_mean_lies_in_its_interval_as_often_as_it_should() -> None:
    rng = np.random.default_rng(1)
    for truth, texts, least in ((0.9, 6, 0.9), (0.6, 6, 0.88), (0.6, 40, 0.9)):
        found = [combined([[[(float(x), 1.0)] for x in rng.random(texts) < truth] for _ in range(4)]) for _ in range(100)]
        hits = sum(each.low <= truth <= each.high for each in found)
        assert least <= hits / 100, (truth, texts)
    wide = float(np.mean([each.high - each.low for each in found]))
    assert wide < 0.2, "many texts give a narrow interval"
    doubled = combined([[[(x, 1.0), (x, 1.0)] for x in (0.0, 1.0, 0.0, 1.0)]])
    assert doubled == combined([[[(x, 1.0)] for x in (0.0, 1.0, 0.0, 1.0)]]), "questions of one text are drawn together"
    (one, four, many) = (combined([[[(1.0, 1.0)]] * n]) for n in (1, 4, 40))
    assert one.low < four.low < many.low < many.high == 1.0, "agreement of a few says little"
    assert not combined([[[(0.5, 1.0)]]], (-1.0, 1.0)).apart, "one text ranks nobody"
    assert combined([[[(0.0, 0.0)]]]) is None


def _share_below(values: list[float], limit: float) -> tuple[float, float]:
    """How much of an exact distribution lies below a limit, without and with the limit itself."""
    drawn = np.array(values)
    return float((drawn < limit - 1e-6).mean()), float((drawn <= limit + 1e-6).mean())


def _is_quantile(values: list[float], limit: float, level: float) -> bool:
    below, upto = _share_below(values, limit)
    return below - 0.012 <= level <= upto + 0.012  # 2,000 draws


TEXTS = [[(1.0, 1.0), (0.0, 1.0)], [(1.0, 1.0)], [(0.0, 1.0), (0.0, 1.0), (1.0, 1.0)]]
DIVERGENCES = [[(0.1, 0.4), (0.3, 0.5)], [(0.2, 0.1)], [(0.05, 0.6), (0.4, 0.9), (0.2, 0.3)]]


def _sums(texts: list[list[tuple[float, float]]], which: tuple[int, ...]) -> tuple[float, float]:
    drawn = [pair for i in which for pair in texts[i]]
    return sum(x for x, _ in drawn), sum(y for _, y in drawn)


def test_the_ends_are_quantiles_of_all_draws_of_whole_texts() -> None:
    draws = [_sums(TEXTS, which) for which in product(range(3), repeat=3)]
    found = combined([TEXTS], None)
    assert found.value == pytest.approx(3 / 6)
    assert _is_quantile([x / y for x, y in draws], found.low, tail([3]))
    assert _is_quantile([x / y for x, y in draws], found.high, 1 - tail([3]))


def test_the_unseen_text_is_uniform_within_the_limits() -> None:
    values = []
    for which in product(range(4), repeat=4):
        x, y = _sums(TEXTS, tuple(i for i in which if i < 3))
        unseen = 2.0 * which.count(3)  # as many questions as a text has on average
        values += [(x + unseen * u) / (y + unseen) for u in (np.arange(40) + 0.5) / 40]
    centered = list(np.clip(np.array(values) + 0.5 - np.mean(values), 0, 1))
    found = combined([TEXTS])
    assert _is_quantile(centered, found.low, 0.025)
    assert _is_quantile(centered, found.high, 0.975)


def test_a_text_that_stands_in_two_tasks_is_drawn_in_both_together() -> None:
    texts = {f"{i}": [(float(i % 3 == 0), 1.0)] for i in range(9)}
    others = {f"other {name}": cluster for name, cluster in texts.items()}
    alone = combined([texts])
    together, apart = combined([texts, dict(reversed(texts.items()))]), combined([texts, others])
    assert together == alone, "the second task's answers are the first's, and say nothing new"
    assert apart.high - apart.low < 0.85 * (alone.high - alone.low), "nine more texts do"
    third = {"0": [(1.0, 1.0)], "other 1": [(0.0, 1.0)]}
    linked = combined([texts, others, third])
    assert linked.value == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3, abs=1e-6)
    some = combined([dict(enumerate(TEXTS)), {1: DIVERGENCES[1], 2: DIVERGENCES[2]}], None)
    rest = _sums(DIVERGENCES, (1, 2))
    whole = rest[0] / rest[1]
    exact = []
    for which in product(range(3), repeat=3):
        x, y = _sums(TEXTS, which)
        a, b = _sums([[], *DIVERGENCES[1:]], which)
        exact.append((x / y + (a / b if b else whole)) / 2)
    assert _is_quantile(exact, some.low, tail([3]))
    assert _is_quantile(exact, some.high, 1 - tail([3]))


def test_the_ratio_of_means_is_numpys_and_its_ends_are_quantiles_of_all_draws() -> None:
    pairs = np.array([pair for text in DIVERGENCES for pair in text])
    found = ratio_of_means([DIVERGENCES])
    assert found.value == pytest.approx(pairs[:, 0].mean() / pairs[:, 1].mean(), abs=1e-6)
    draws = [_sums(DIVERGENCES, which) for which in product(range(3), repeat=3)]
    assert _is_quantile([x / y for x, y in draws], found.low, tail([3]))
    assert _is_quantile([x / y for x, y in draws], found.high, 1 - tail([3]))
    turned = ratio_of_means([[[(y, x) for x, y in text] for text in DIVERGENCES]])
    assert [turned.low, turned.high] == pytest.approx([1 / found.high, 1 / found.low], rel=1e-2)
    two = ratio_of_means([DIVERGENCES, [[(1.0, 3.0)], [(2.0, 5.0)]]])
    means = pairs.mean(0) + np.array([1.5, 4.0])
    assert two.value == pytest.approx(means[0] / means[1], abs=1e-6), "every task counts the same"
    assert Interval(0.2, 0.1, 0.4).mirrored == (-0.2, -0.4, -0.1)
    assert ratio_of_means([]) is None
    assert ratio_of_means([[[(1.0, 0.0)]]]) is None
    assert ratio_of_means([[[(0.2, 0.2)], [(0.3, 0.3)]]]) == (1, 1, 1)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Twenty texts of five questions, right together more often than not; and KLs of two methods on twelve texts."""
    rng = np.random.default_rng(2)
    hits = naive = 0
    for _ in range(200):
        easy = rng.beta(9, 1, 20)  # of each text, how likely its answers are right: .9 on average
        answers = [[(float(rng.random() < p), 1.0) for _ in range(5)] for p in easy]
        found = combined([answers])
        alone = combined([[[answer] for text in answers for answer in text]], None)
        hits += found.low <= 0.9 <= found.high
        naive += alone.low <= 0.9 <= alone.high
    assert 0.91 <= hits / 200 <= 1
    assert naive < hits, "questions that are drawn one by one claim too much"
    hits = 0
    for _ in range(200):
        base = rng.lognormal(-3, 0.7, 12)
        pairs = [[(0.5 * x * rng.lognormal(-0.045, 0.3), x)] for x in base]
        found = ratio_of_means([pairs])
        hits += found.low <= 0.5 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_few_texts_expand_an_interval_as_students_t_does() -> None:
    for n, t in ((6, 2.5706), (8, 2.3646), (12, 2.2010), (21, 2.0860), (1001, 1.9623)):
        assert tail([n]) == pytest.approx(NormalDist().cdf(-t * (n / (n - 1)) ** 0.5), rel=0.02)
    assert tail([4, 4]) < tail([8]), "a mean of each task is estimated"
    assert tail([1, 1]) == 0, "one text a task: all draws"
    five = [[[(x, 1.0)] for x in (0.1, 0.5, 0.2, 0.9, 0.4)]]
    assert combined(five, None).low < np.quantile([np.mean(x) for x in product((0.1, 0.5, 0.2, 0.9, 0.4), repeat=5)], 0.025)
