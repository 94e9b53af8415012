"""D2O: H2O's tokens, similar dropped ones merged in. arXiv 2406.13035."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps

import torch
from torch import Tensor

from keepkv import score
from keepkv.allot import room, shares, split
from keepkv.merge.merged import Merged
from keepkv.merge.similarity import grouped, similarity
from keepkv.methods.base import Method
from keepkv.types import Choice, Observation


def steady_layers(scores: Tensor, total: int, whole: tuple[int, ...] = (0, 1, -1)) -> list[list[int]]:
    """Layers whose attention is spread evenly get more, in proportion to exp(-F); the heads of a layer are alike.

    F is the variance over tokens of the attention that they receive in all (the scores), scaled to [0, 1] between a layer's
    heads and averaged over them, as in the authors' code. What must stay is left out. The first two layers and the last one are
    not compressed if that takes at most half of the budget. The paper spares them always, which at a tenth would leave nothing
    for the others. D2O, arXiv 2406.13035, section 3; `docs/theory.md 8.2`.
    """
    layers, heads, _ = scores.shape
    counted = scores.isfinite()
    number = counted.sum(-1).clamp(min=1)
    mean = scores.where(counted, 0).sum(-1) / number
    variance = (scores - mean[..., None]).where(counted, 0).square().sum(-1) / number
    low, high = variance.amin(1, keepdim=True), variance.amax(1, keepdim=True)
    layer_weights = (-((variance - low) / (high - low + 1e-6)).mean(1)).exp().tolist()

    rooms = room(scores)  # of every head, the layers one after the other
    layer_of = [index // heads for index in range(layers * heads)]
    spared = {layer % layers for layer in whole}
    spared_slots = sum(n for n, layer in zip(rooms, layer_of, strict=True) if layer in spared)
    if len(spared) == layers or spared_slots > total / 2:
        spared, spared_slots = set(), 0
    most = [0 if layer in spared else n for n, layer in zip(rooms, layer_of, strict=True)]
    counts = shares([layer_weights[layer] for layer in layer_of], min(total - spared_slots, sum(most)), most)
    whole_counts = [n if layer in spared else count for n, count, layer in zip(rooms, counts, layer_of, strict=True)]
    return split(whole_counts, heads)


def merge_by_cosine(
    keys: Tensor, values: Tensor, choice: Choice, bias: Tensor | None = None, verbatim: Tensor | None = None
) -> Merged:
    """Dropped entries join the most similar kept one, if they are similar enough.

    Entry i joins c = argmax cos(k_i, k_c) if that cosine is at least τ, the mean of the dropped entries' greatest cosines.
    Weights are e^cos, normalized over c (cosine 1) and what joins it, the same for keys and values. There are no votes. These
    are the paper's weights. D2O, arXiv 2406.13035, section 3; `docs/theory.md 8.2`.
    """
    bias = torch.zeros(len(keys), device=keys.device) if bias is None else bias
    best, target = similarity(keys, choice.kept, verbatim)
    gone = ~bias.isneginf() & best.isfinite()
    gone[choice.kept] = False
    threshold = best[gone].mean() if gone.any() else 0
    target = target.masked_fill(~gone | (best < threshold), -1)
    target[choice.kept] = torch.arange(len(choice.kept), device=keys.device)
    groups, bias, votes = grouped(Choice(choice.kept, target), bias, keys)
    cosine = best[groups.member].masked_fill(groups.member == choice.kept[groups.slot], 1)
    share = groups.shares(votes * cosine.exp())
    return groups.result((keys, values, bias), groups.mean(keys, share), groups.mean(values, share), bias[choice.kept])


@wraps(merge_by_cosine)
def by_cosine(observation: Observation, choices: Sequence[Choice]) -> list[Merged]:
    heads = zip(observation.keys.float(), observation.values.float(), choices, strict=True)
    return [
        merge_by_cosine(*inputs, bias=observation.head_bias(head), verbatim=observation.head_keep(head))
        for head, inputs in enumerate(heads)
    ]


METHODS = (
    Method(
        name="d2o",
        summary="H2O's tokens, more of them in layers of even attention, similar dropped ones merged in",
        paper="D2O, arXiv 2406.13035",
        score=score.accumulated,
        allot=steady_layers,
        recent=0.25,
        merge=by_cosine,
        column_mass=True,
        cost="all attention summed once more while reading, and the cosines of dropped with kept keys",
        good="moderate budgets",
        bad="small budgets: merged entries have no votes, so their mass is lost",
    ),
)
