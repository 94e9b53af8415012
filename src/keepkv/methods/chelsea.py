"""Chelsea: neighbors clustered chunk by chunk. arXiv 2506.11418."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from keepkv import score
from keepkv.choose import shifted
from keepkv.merge.merged import Merged
from keepkv.merge.per_head import by_sets
from keepkv.merge.similarity import Groups, grouped
from keepkv.methods.base import Method
from keepkv.types import Choice, Observation


def bipartite(observation: Observation, scores: Tensor, counts: Sequence[int], chunk: int = 64) -> list[Choice]:
    """Alternate neighbors matched by the similarity of their keys, chunk by chunk, until the count is met.

    The entries that need not stay are cut into chunks of 64. In each, every second one is linked to its most similar one among
    the others. The strongest links of all chunks join clusters, and the mean key of a cluster takes part in the next round. A
    round at most halves the number. The chunk size is ours, as the paper does not state it. Chelsea, arXiv 2506.11418;
    `docs/theory.md 8.4`.
    """
    choices = []
    for head, count in enumerate(counts):
        first = int((~observation.present[head]).sum())  # entries that only fill up stand in front
        fixed = scores[head, first:].isposinf()
        middle = (~fixed).nonzero().flatten()
        surplus = len(fixed) - count
        keys = observation.keys[head, first:].float()[middle]
        bias = observation.head_bias(head)
        votes = torch.ones(len(middle), device=keys.device) if bias is None else bias[first:][middle].exp()
        cluster = torch.arange(len(middle), device=keys.device)  # of every entry in the middle
        # Each round replaces keys and votes by those of the clusters, and follows where every entry went.
        while surplus > 0 and len(keys) > 1:
            source, target = _links(keys, min(chunk, len(keys)), surplus)
            leader = torch.arange(len(keys), device=keys.device)
            leader[source] = target
            leaders, joined = torch.unique(leader, return_inverse=True)
            groups = Groups(leaders, joined)
            keys = groups.mean(keys, groups.shares(votes[groups.member]))
            votes = groups.sum(votes[groups.member])
            cluster = joined[cluster]
            surplus -= len(source)
        # A cluster's slot is that of its oldest entry.
        oldest = torch.full((len(keys),), len(fixed), device=keys.device).scatter_reduce(0, cluster, middle, "amin")
        kept = torch.cat([fixed.nonzero().flatten(), oldest]).sort().values
        slot = torch.zeros_like(fixed, dtype=torch.int64).scatter(0, kept, torch.arange(len(kept), device=keys.device))
        target = slot.scatter(0, middle, slot[oldest[cluster]])
        choices.append(shifted(kept, target, first))
    return choices


def _links(keys: Tensor, chunk: int, most: int) -> tuple[Tensor, Tensor]:
    """The strongest links, at most `most`, from entries at odd places of each chunk of keys [n, d] to one at an even place."""
    count = len(keys)
    chunk += chunk % 2
    place = torch.arange(-(-count // chunk) * chunk, device=keys.device).view(-1, chunk)
    unit = normalize(keys, dim=-1)[place.clamp(max=count - 1)]
    cosine = unit[:, 1::2] @ unit[:, ::2].transpose(-1, -2)
    beyond = (place[:, None, ::2] >= count) | (place[:, 1::2, None] >= count)
    strength, into = cosine.masked_fill(beyond, -torch.inf).max(-1)
    source, target = place[:, 1::2], place[:, ::2].gather(1, into)
    usable = strength.isfinite().flatten().nonzero().flatten()
    best = usable[strength.flatten()[usable].argsort(descending=True, stable=True)[:most]]
    return source.flatten()[best], target.flatten()[best]


def centroid(keys: Tensor, values: Tensor, choice: Choice, bias: Tensor | None = None) -> Merged:
    """Means, and the number of members as a vote. Chelsea / CentroidKV, arXiv 2506.11418.

    k_r = sum p_i k_i / P, v_r = sum p_i v_i / P and the bias ln P, with P = sum p_i and p the votes (1 for a token). As in the
    paper, the slot attends a little too quietly, by e^-KL(m||π) (`docs/theory.md 2.4`).
    """
    groups, bias, votes = grouped(choice, bias, keys)
    share = groups.shares(votes)
    before = keys, values, bias
    return groups.result(before, groups.mean(keys, share), groups.mean(values, share), groups.sum(votes).log())


METHODS = (
    Method(
        name="chelsea",
        summary="neighbors clustered chunk by chunk, means with their number as vote",
        paper="Chelsea, arXiv 2506.11418",
        score=score.recency,
        recent=64,
        choose=bipartite,
        merge=by_sets(centroid),
        cost="cosines within chunks of 64, once per halving",
        good="text of even importance; needs no query at all",
        bad="small budgets: means of unlike keys answer nobody",
    ),
)
