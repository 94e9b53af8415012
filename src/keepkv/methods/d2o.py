"""D2O: H2O's tokens, similar dropped ones merged in. arXiv 2406.13035."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps

import torch
from torch import Tensor

from keepkv import score
from keepkv.allot import room, shares, split
from keepkv.merge.merged import Merged
from keepkv.merge.similarity import _grouped, similarity
from keepkv.methods.base import Method
from keepkv.types import Choice, Observation


def steady_layers(scores: Tensor, total: int, whole: tuple[int, ...] = (0, 1, -1)) -> list[list[int]]:
    """Layers whose attention is spread evenly get more, ∝ exp(-F), heads alike. D2O, arXiv 2406.13035, section 3.

    F is the variance over tokens of the attention they receive in all (scores), scaled to [0, 1] between a layer's
    heads and averaged over them, as in the authors' code; what must stay is left out. The first two layers and the last
    are not compressed if that takes at most half of the budget: the paper spares them always, which at a tenth
    would leave nothing for the others.
    """
    layers, heads, _ = scores.shape
    counted = scores.isfinite()
    mean = scores.where(counted, 0).sum(-1) / counted.sum(-1).clamp(min=1)
    variance = (scores - mean[..., None]).where(counted, 0).square().sum(-1) / counted.sum(-1).clamp(min=1)
    low, high = variance.amin(1, keepdim=True), variance.amax(1, keepdim=True)
    weights = (-((variance - low) / (high - low + 1e-6)).mean(1)).exp().tolist()
    rooms = room(scores)
    spared = {layer % layers for layer in whole}
    spared_slots = sum(sum(rooms[layer * heads : (layer + 1) * heads]) for layer in spared)
    if len(spared) == layers or spared_slots > total / 2:
        spared = set()
    most = [0 if i // heads in spared else n for i, n in enumerate(rooms)]
    rest = total - (spared_slots if spared else 0)
    counts = shares([weights[i // heads] for i in range(layers * heads)], min(rest, sum(most)), most)
    return split([rooms[i] if i // heads in spared else n for i, n in enumerate(counts)], heads)


def merge_by_cosine(
    keys: Tensor, values: Tensor, choice: Choice, bias: Tensor | None = None, verbatim: Tensor | None = None
) -> Merged:
    """Dropped entries join the most similar kept one, if similar enough. D2O, arXiv 2406.13035, the paper's weights.

    Entry i joins c = argmax cos(k_i, k_c) if that cosine is at least τ, the mean of the dropped entries' greatest cosines;
    weights e^cos normalised over c (cosine 1) and what joins it, the same for keys and values; no votes. SYSTEMS 6.2.
    """
    bias = torch.zeros(len(keys), device=keys.device) if bias is None else bias
    best, target = similarity(keys, choice.kept, verbatim)
    gone = ~bias.isneginf() & best.isfinite()
    gone[choice.kept] = False
    threshold = best[gone].mean() if gone.any() else 0
    target = target.masked_fill(~gone | (best < threshold), -1)
    target[choice.kept] = torch.arange(len(choice.kept), device=keys.device)
    groups, bias, votes = _grouped(Choice(choice.kept, target), bias, keys)
    close = best[groups.member].masked_fill(groups.member == choice.kept[groups.slot], 1)
    share = groups.shares(votes * close.exp())
    return groups.result((keys, values, bias), groups.mean(keys, share), groups.mean(values, share), bias[choice.kept])


@wraps(merge_by_cosine)
def by_cosine(seen: Observation, choices: Sequence[Choice]) -> list[Merged]:
    rows = zip(seen.keys.float(), seen.values.float(), choices, strict=True)
    return [merge_by_cosine(*row, bias=seen.head_bias(h), verbatim=seen.head_keep(h)) for h, row in enumerate(rows)]


METHODS = (
    Method(
        "d2o",
        "H2O's tokens by layer dispersion, similar dropped ones merged in",
        "D2O, arXiv 2406.13035",
        score.accumulated,
        steady_layers,
        recent=0.25,
        merge=by_cosine,
        column_mass=True,
        cost="all attention summed once more while reading, and the cosines of dropped with kept keys",
        good="moderate budgets",
        bad="merged entries have no votes, so their mass is lost",
    ),
)
