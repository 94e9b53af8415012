"""KVCompose: what reading the text again asks for, as many slots for all heads of a layer. arXiv 2509.05165."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.allot import room
from keepkv.methods.base import Method
from keepkv.observe.repetition import Repeat
from keepkv.types import Observation

AGAIN = Repeat(chunk=2048, draft=1, needed=True, group_mean=True)  # the text once more, over its full cache


def asked_in_layer(observation: Observation) -> Tensor:
    """s_hi = p_hi + mean over heads of p_hi, p_hi what the text, read again, pays to token i in KV head h. [H, T].

    p_hi is the largest share of attention over the queries of the second reading, mean over the query heads of the group.
    Shares are counted among the text and the second reading. Texts of more than 2,048 tokens are read again in pieces, each of
    which asks for its own tokens. KVCompose, arXiv 2509.05165. The mean over heads is added as in kvpress'
    KVComposePress; a token that some heads do not hold any more counts 0 there.
    """
    peak = observation.repeat_peak
    assert peak is not None, "the method table has the text repeated"
    peak = peak.where(observation.present, 0)
    places = observation.positions.clamp(min=0)
    of_token = peak.new_zeros(observation.tokens).scatter_add_(0, places.flatten(), peak.flatten())
    return peak + of_token[places] / observation.heads


def composite(scores: Tensor, total: int, first_largest: bool = False) -> list[list[int]]:
    """Layers compete for the slots with composite tokens, each of which takes one slot in every head of a layer.

    The r-th composite token of a layer is made of the r-th best entry of each of its heads, and its score is the mean of
    theirs. The best composite tokens of all layers are kept, at least one in each layer. What the heads of a layer cannot share
    equally is not spent. KVCompose, arXiv 2509.05165.

    Args:
        scores: [L, H, T].
        total: Slots in all.
        first_largest: Whether the first layer gets the best score of any layer at every rank, so that no layer has more slots.
            kvpress does so because transformers takes the length of a cache from its first layer. A cache of slots need not.
    """
    layers, heads, entries = scores.shape
    ranked = scores.sort(dim=-1, descending=True).values.mean(1)  # -inf where a head has fewer entries
    if first_largest:
        ranked[0] = ranked.amax(0)
    ranked[:, 0] = torch.inf
    most = [min(room(layer)) for layer in scores]
    winners = ranked.flatten().topk(min(total // heads, sum(most))).indices
    counts: list[int] = torch.bincount(winners // entries, minlength=layers).tolist()
    return [[min(count, limit)] * heads for count, limit in zip(counts, most, strict=True)]


METHODS = (
    Method(
        name="kvcompose",
        summary="what reading the text again asks for, as many slots for all heads of a layer",
        paper="KVCompose, arXiv 2509.05165",
        score=asked_in_layer,
        allot=composite,
        sinks=0,
        recent=0,
        repeat=AGAIN,
        cost="reading the text again over its full cache: two to three times the reading",
        good="verbatim details, in engines whose heads must be alike",
        bad="aggregates; heads of one layer that need different numbers of slots",
    ),
)
