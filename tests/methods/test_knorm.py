"""Knorm and KeyDiff: scores of keys alone."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from keepkv.methods import keydiff, knorm
from methods.observed import seen


def test_knorm_and_keydiff_need_no_query() -> None:
    observation = seen(queries=torch.full((2, 3, 60, 16), torch.nan))
    keys = observation.keys.double()
    torch.testing.assert_close(knorm.small_keys(observation).double(), -keys.norm(dim=-1), rtol=1e-5, atol=1e-6)
    mean = normalize(keys, dim=-1).mean(1, keepdim=True)
    wanted = -torch.cosine_similarity(keys, mean, dim=-1)
    torch.testing.assert_close(keydiff.distinct_keys(observation).double(), wanted, rtol=1e-4, atol=1e-6)
