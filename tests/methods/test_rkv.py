"""R-KV: importance less redundancy."""

from __future__ import annotations

from dataclasses import replace

import torch

from helpers import randn64
from keepkv.methods import rkv
from methods.observed import seen


def test_r_kv_is_importance_less_redundancy() -> None:
    observation = seen()
    got, keys = rkv.joint(observation), observation.keys.double()
    for head in range(2):
        logits = 0.25 * (observation.queries.double()[head, :, -8:] @ keys[head].T).amax(0)[:, :52]
        important = logits.softmax(-1).mean(0)
        pooled = torch.stack([important[max(0, i - 3) : i + 4].max() for i in range(52)])
        near = torch.cosine_similarity(keys[head][:, None], keys[head][None], dim=-1).fill_diagonal_(0)
        for row in near:
            alike = (row > 0.5).nonzero().flatten()
            if len(alike):
                row[alike[-1]] = 0
        redundant = near.mean(0).softmax(0)[:52]
        torch.testing.assert_close(got[head, :52].double(), 0.1 * pooled - 0.9 * redundant, rtol=1e-3, atol=1e-6)
    assert got[:, 52:].isposinf().all()


def test_r_kv_keeps_the_last_of_equal_tokens() -> None:
    keys = randn64(1, 60, 16, seed=5).float()
    keys[0, [10, 20, 30]] = keys[0, 10].clone()
    got = rkv.joint(replace(seen(heads=1), keys=keys), weight=0.0)[0]
    assert got[30] > got[20]
    assert got[30] > got[10]
