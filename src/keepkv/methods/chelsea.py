"""Chelsea: neighbors clustered chunk by chunk. arXiv 2506.11418."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from keepkv import score
from keepkv.choose import _shifted
from keepkv.merge.merged import Merged
from keepkv.merge.per_head import by_sets
from keepkv.merge.similarity import Groups, _grouped
from keepkv.methods.base import Method
from keepkv.types import Choice, Observation


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


# --- without scores ---


def centroid(keys: Tensor, values: Tensor, choice: Choice, bias: Tensor | None = None) -> Merged:
    """Means, and the number of members as a vote. Chelsea / CentroidKV, arXiv 2506.11418.

    k_r = sum p_i k_i / P, v_r = sum p_i v_i / P, bias ln P with P = sum p_i, p the votes (1 for a token). It attends a little
    too quietly, by e^-KL (SYSTEMS 4.1), as in the paper.
    """
    groups, bias, votes = _grouped(choice, bias, keys)
    share = groups.shares(votes)
    before = keys, values, bias
    return groups.result(before, groups.mean(keys, share), groups.mean(values, share), groups.sum(votes).log())


METHODS = (
    Method(
        "chelsea",
        "neighbours clustered chunk by chunk, means with their number as vote",
        "Chelsea, arXiv 2506.11418",
        score.recency,
        recent=64,
        choose=bipartite,
        merge=by_sets(centroid),
        cost="cosines within chunks of 64, once per halving",
        good="text of even importance; needs no query at all",
        bad="small budgets: means of unlike keys answer nobody",
    ),
)
