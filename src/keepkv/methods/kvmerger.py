"""KVMerger: runs of neighbors with similar keys, merged around a pivot. arXiv 2407.08454."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from keepkv import score
from keepkv.choose import shifted
from keepkv.merge.merged import Merged
from keepkv.merge.per_head import by_sets
from keepkv.merge.similarity import grouped
from keepkv.methods.base import Method
from keepkv.types import Choice, Observation


def consecutive(observation: Observation, scores: Tensor, counts: Sequence[int], heavy: float = 0.1) -> list[Choice]:
    """Runs of neighbors with similar keys, each with its best entry as pivot. KVMerger, arXiv 2407.08454; `docs/theory.md 8.3`.

    A run goes on while the cosine of adjacent keys is above ε. Here ε is set for each head so that there are as many runs as
    slots: the least similar neighbors are parted first. The best tenth of the slots by score (heavy hitters) and what must stay
    are runs of their own.
    """
    choices = []
    for head, count in enumerate(counts):
        first = int((~observation.present[head]).sum())  # entries that only fill up stand in front
        score = scores[head, first:]
        fixed = score.isposinf()
        most = max(0, count // 3 - int(fixed.sum()))  # every heavy hitter may part a run: it costs up to two slots
        hitters = score.masked_fill(fixed, -torch.inf).topk(min(len(score), most, int(heavy * count))).indices
        fixed = fixed.scatter(0, hitters, True)

        # The distance of each entry's key from the one before, 0 to 2; above that, in this order, what must begin a run:
        # what stands behind a run of its own, the first entry, a run of its own. The farthest `count` entries begin one.
        unit = normalize(observation.keys[head, first:].float(), dim=-1)
        distance = 1 - (unit * unit.roll(1, 0)).sum(1)
        distance[0] = 4
        distance[1:] = torch.where(fixed[:-1], 3.0, distance[1:])
        distance = distance.masked_fill(fixed, 5)
        starts = torch.zeros_like(fixed).scatter(0, distance.argsort(descending=True, stable=True)[:count], True)

        # Entries before the first run, and those behind a run of its own that begin none, are dropped.
        run = starts.cumsum(0) - 1
        run_is_fixed = fixed[starts.nonzero().flatten()]
        run = run.masked_fill((run < 0) | (~starts & run_is_fixed[run.clamp(min=0)]), -1)
        choices.append(shifted(_pivots(score, run), run, first))
    return choices


def _pivots(score: Tensor, run: Tensor) -> Tensor:
    """The best entry of every run, of equals the first; ascending, since runs follow one another."""
    order = score.argsort(descending=True, stable=True)
    order = order[run[order] >= 0]
    order = order[run[order].argsort(stable=True)]
    run_of = run[order]
    is_best = torch.cat([run_of.new_ones(1, dtype=torch.bool), run_of[1:] != run_of[:-1]])
    return order[is_best]


def gaussian(
    keys: Tensor,
    values: Tensor,
    choice: Choice,
    bias: Tensor | None = None,
    sigma: float = 5.0,
    sized: bool = False,
) -> Merged:
    """Means weighted by the distance from the set's pivot, which is its kept entry. KVMerger, arXiv 2407.08454.

    g_i = exp(-||k_p - k_i||² / 2σ²), k_r = sum g_i k_i / sum g_i, v_r = sum g_i v_i / sum g_i. There are no votes: the set
    attends as one token. With `sized`, v_r is multiplied by the set's size, as notes on the paper have it. That mends the
    numerator of attention and not its denominator, and breaks the model wherever much is merged (`docs/theory.md 8.3`,
    measured in `docs/notes/other-methods.md`).
    """
    groups, bias, votes = grouped(choice, bias, keys)
    distance = (keys[groups.kept[groups.slot]] - keys[groups.member]).square().sum(1)
    share = groups.shares(votes * (-distance / (2 * sigma**2)).exp())
    mean = groups.mean(values, share)
    mean = mean * groups.size[:, None] if sized else mean
    return groups.result((keys, values, bias), groups.mean(keys, share), mean, bias[groups.kept])


METHODS = (
    Method(
        name="kvmerger",
        summary="runs of neighbors with similar keys, merged around a pivot",
        paper="KVMerger, arXiv 2407.08454",
        score=score.accumulated,
        recent=0.25,
        choose=consecutive,
        merge=by_sets(gaussian),
        column_mass=True,
        cost="all attention summed once more while reading",
        good="moderate budgets: the phases of neighbors hardly differ",
        bad="small budgets: without votes the merged sets lose their mass",
    ),
)
