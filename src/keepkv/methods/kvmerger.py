"""KVMerger: runs of neighbors with similar keys, merged around a pivot. arXiv 2407.08454."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from keepkv import score
from keepkv.choose import _shifted
from keepkv.merge.merged import Merged
from keepkv.merge.per_head import by_sets
from keepkv.merge.similarity import _grouped
from keepkv.methods.base import Method
from keepkv.types import Choice, Observation


def consecutive(observation: Observation, scores: Tensor, counts: Sequence[int], heavy: float = 0.1) -> list[Choice]:
    """Runs of neighbours with similar keys, each with its best entry as pivot. KVMerger, arXiv 2407.08454.

    A run goes on while the cosine of adjacent keys is above ε. ε is set for each head so that there are as many runs as
    slots: the least similar neighbours are parted first. The best tenth of the slots by score (heavy hitters) and
    what must stay are runs of their own.
    """
    chosen = []
    for head, count in enumerate(counts):
        first = int((~observation.present[head]).sum())  # those that fill up stand in front
        score = scores[head, first:]
        fixed = score.isposinf()
        spare = max(0, count // 3 - int(fixed.sum()))  # every heavy hitter may part a run: it costs up to two slots
        best = score.masked_fill(fixed, -torch.inf).topk(min(len(score), spare, int(heavy * count))).indices
        fixed = fixed.scatter(0, best, True)
        unit = normalize(observation.keys[head, first:].float(), dim=-1)
        apart = 1 - (unit * unit.roll(1, 0)).sum(1)  # 0 to 2
        apart[0] = 4
        apart[1:] = torch.where(fixed[:-1], 3.0, apart[1:])
        apart = apart.masked_fill(fixed, 5)
        starts = torch.zeros_like(fixed).scatter(0, apart.argsort(descending=True, stable=True)[:count], True)
        run = starts.cumsum(0) - 1
        run = run.masked_fill((run < 0) | (~starts & fixed[starts.nonzero().flatten()][run.clamp(min=0)]), -1)
        kept = _pivots(score, run)
        chosen.append(_shifted(kept, run, first))
    return chosen


def _pivots(score: Tensor, run: Tensor) -> Tensor:
    """The best entry of every run, the first of equals; ascending, since runs follow one another."""
    order = score.argsort(descending=True, stable=True)
    order = order[run[order] >= 0]
    order = order[run[order].argsort(stable=True)]
    named = run[order]
    leads = torch.cat([named.new_ones(1, dtype=torch.bool), named[1:] != named[:-1]])
    return order[leads]


def gaussian(
    keys: Tensor, values: Tensor, choice: Choice, bias: Tensor | None = None, sigma: float = 5.0, sized: bool = False
) -> Merged:  # fmt: skip
    """Means weighted by the distance from the set's pivot, its kept entry. KVMerger, arXiv 2407.08454.

    g_i = exp(-||k_p - k_i||² / 2σ²), k_r = sum g_i k_i / sum g_i, v_r = sum g_i v_i / sum g_i. No votes: the set attends as
    one token. sized: v_r times the set's size, as notes on the paper have it (SYSTEMS 6.3); that mends the numerator of
    attention and not its denominator, and breaks the model wherever much is merged (docs/log.md).
    """
    groups, bias, votes = _grouped(choice, bias, keys)
    distance = (keys[groups.kept[groups.slot]] - keys[groups.member]).square().sum(1)
    share = groups.shares(votes * (-distance / (2 * sigma**2)).exp())
    mean = groups.mean(values, share)
    mean = mean * groups.size[:, None] if sized else mean
    return groups.result((keys, values, bias), groups.mean(keys, share), mean, bias[groups.kept])


METHODS = (
    Method(
        "kvmerger",
        "runs of neighbours with similar keys, merged around a pivot",
        "KVMerger, arXiv 2407.08454",
        score.accumulated,
        recent=0.25,
        choose=consecutive,
        merge=by_sets(gaussian),
        column_mass=True,
        cost="all attention summed once more while reading",
        good="moderate budgets: neighbours' phases hardly differ",
        bad="small budgets: without votes the merged sets lose their mass",
    ),
)
