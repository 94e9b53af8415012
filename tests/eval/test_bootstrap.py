"""Bootstrap intervals."""

from __future__ import annotations

import numpy as np

from keepkv.eval.bootstrap import combined


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
