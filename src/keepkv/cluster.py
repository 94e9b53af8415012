"""Cluster: which entries become one slot together, for methods that merge by sets. All are `choose` functions.

Each maps an Observation, scores [H, T] and the slots of every head to a `Choice` per head, whose target says where every
entry goes. Entries with a score of +inf stay alone; those of -inf only fill up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from keepkv.sets import Groups
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


def bipartite(observation: Observation, scores: Tensor, counts: Sequence[int], chunk: int = 64) -> list[Choice]:
    """Alternate neighbours matched by key similarity, chunk by chunk, until the count is met. Chelsea, arXiv 2506.11418.

    The entries that need not stay are cut into chunks of 64; in each, every second one (A) is linked to its most similar other
    one (B); the strongest links of all chunks join clusters, whose mean key takes part in the next round. A round at
    most halves their number. The chunk size is ours; the paper's was not to be had (SYSTEMS 6.4).
    """
    chosen = []
    for head, count in enumerate(counts):
        first = int((~observation.present[head]).sum())
        fixed = scores[head, first:].isposinf()
        middle, need = (~fixed).nonzero().flatten(), len(fixed) - count
        keys, bias = observation.keys[head, first:].float()[middle], observation.head_bias(head)
        votes = torch.ones(len(middle), device=keys.device) if bias is None else bias[first:][middle].exp()
        cluster = torch.arange(len(middle), device=keys.device)  # of every entry in the middle
        while need > 0 and len(keys) > 1:
            source, into = _links(keys, min(chunk, len(keys)), need)
            joined = torch.arange(len(keys), device=keys.device)
            joined[source] = into
            stay, joined = torch.unique(joined, return_inverse=True)
            groups = Groups(stay, joined)
            keys = groups.mean(keys, groups.shares(votes[groups.member]))
            votes, cluster, need = groups.sum(votes[groups.member]), joined[cluster], need - len(source)
        leads = torch.full((len(keys),), len(fixed), device=keys.device).scatter_reduce(0, cluster, middle, "amin")
        kept = torch.cat([fixed.nonzero().flatten(), leads]).sort().values
        slot = torch.zeros_like(fixed, dtype=torch.int64).scatter(0, kept, torch.arange(len(kept), device=keys.device))
        target = slot.scatter(0, middle, slot[leads[cluster]])
        chosen.append(_shifted(kept, target, first))
    return chosen


def _links(keys: Tensor, chunk: int, most: int) -> tuple[Tensor, Tensor]:
    """The strongest links, at most `most`, from entries at odd places of each chunk of keys [n, d] to one at an even place."""
    count = len(keys)
    chunk += chunk % 2
    place = torch.arange(-(-count // chunk) * chunk, device=keys.device).view(-1, chunk)
    unit = normalize(keys, dim=-1)[place.clamp(max=count - 1)]
    near = unit[:, 1::2] @ unit[:, ::2].transpose(-1, -2)
    near = near.masked_fill((place[:, None, ::2] >= count) | (place[:, 1::2, None] >= count), -torch.inf)
    strength, into = near.max(-1)
    source, target = place[:, 1::2], place[:, ::2].gather(1, into)
    usable = strength.isfinite().flatten().nonzero().flatten()
    best = usable[strength.flatten()[usable].argsort(descending=True, stable=True)[:most]]
    return source.flatten()[best], target.flatten()[best]


def _pivots(score: Tensor, run: Tensor) -> Tensor:
    """The best entry of every run, the first of equals; ascending, since runs follow one another."""
    order = score.argsort(descending=True, stable=True)
    order = order[run[order] >= 0]
    order = order[run[order].argsort(stable=True)]
    named = run[order]
    leads = torch.cat([named.new_ones(1, dtype=torch.bool), named[1:] != named[:-1]])
    return order[leads]


def _shifted(kept: Tensor, target: Tensor, first: int) -> Choice:
    """The choice among all entries, `first` of which only fill up in front."""
    return Choice(kept + first, torch.cat([target.new_full((first,), -1), target]))
