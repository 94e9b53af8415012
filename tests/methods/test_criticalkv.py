"""CriticalKV: the second half of the slots goes by the change of the output."""

from __future__ import annotations

import torch

from helpers import randn64
from keepkv.methods import criticalkv
from methods.observed import INF, seen


def test_criticalkv_fills_its_second_half_by_what_leaving_out_may_change() -> None:
    projection = randn64(2, 3, 16, 20, seed=3).float()
    observation, scores = seen(projection=projection), torch.rand(2, 60)
    scores[:, 59] = INF
    chosen = criticalkv.two_stages(observation, scores, [20, 21])
    for head, (choice, count) in enumerate(zip(chosen, (20, 21), strict=True)):
        loud = torch.stack([(observation.values[head] @ weight).abs().sum(1) for weight in projection[head]]).mean(0)
        first = scores[head].argsort(descending=True)[: count // 2]
        rest = (scores[head] + 1e-4) * loud
        rest[first] = INF
        assert choice.kept.tolist() == sorted(rest.argsort(descending=True)[:count].tolist())
        assert 59 in choice.kept
