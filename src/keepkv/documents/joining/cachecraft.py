"""Cache-Craft, arXiv 2502.15734: how many tokens of a reused text must be read again, and which.

A variant of a text is the text as it once stood behind other texts, with the attention that it paid them. Where it is used
again, it needs less repair the less it looked at other texts, and the more of those it looked at stand before it again, in the
same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv import schema
from keepkv.cache import KeepCache
from keepkv.documents.format import MOST_TOKENS, Contents, write
from keepkv.documents.joining.cacheblend import Recomputed, RecomputedLayer, ReusedText, recompute
from keepkv.errors import InputError
from keepkv.models import identity
from keepkv.ops.softmax import PLAIN, Softmax, shares

ALPHA = 1.0  # the paper tunes it on validation texts; more reads more again
_TILE = 1 << 24  # logits held at once


@dataclass(frozen=True)
class ChunkVariant:
    """A text of n tokens as it once stood behind j other texts.

    Attributes:
        before: The names of the other texts, in their order.
        sizes: How many tokens each of them has.
        start: The text's first position: their sum.
        inter: The attention that each token paid to each of them, a mean over heads, in every layer: float32 [L, n, j].
        intra: The attention that each token paid to the text itself, float32 [L, n].
        recomputed: The text's keys and values there. A loaded variant has them without the queries.
    """

    before: tuple[str, ...]
    sizes: tuple[int, ...]
    start: int
    inter: Tensor
    intra: Tensor
    recomputed: Recomputed

    @property
    def impact(self) -> float:
        """Chunk context impact, CCI, section 3.2.

        sigmoid(a / b), where a is the attention per pair of tokens to other texts, and b that to the text itself.
        """
        count = self.inter.shape[1]
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        outside = (self.inter.double().sum(1) / (count * sizes)).sum(-1).mean()
        inside = (self.intra.double().sum(-1) / count**2).mean()
        return float(torch.sigmoid(outside / inside))

    @property
    def ranking(self) -> Tensor:
        """Tokens, int64 [n]: first those that paid most attention to other texts."""
        return self.inter.sum((0, 2)).argsort(descending=True, stable=True)

    def overlap(self, before: Sequence[str]) -> float:
        """β' = β (1 - γ): how much of what the text looked at stands before it again.

        β is the share of its attention to other texts that went to texts which stand before it again. γ is the share of pairs
        of these texts that changed their order, 0 for fewer than two.
        """
        common = [key for key in self.before if key in before]
        paid = dict(zip(self.before, self.inter.sum((0, 1)).tolist(), strict=True))
        total = sum(paid.values())
        if not common or not total:
            return 0.0
        places = [list(before).index(key) for key in common]
        pairs = list(combinations(places, 2))
        changed = sum(a > b for a, b in pairs) / len(pairs) if pairs else 0.0
        return float(sum(paid[key] for key in common) / total * (1 - changed))

    def overhead(self, before: Sequence[str], alpha: float = ALPHA) -> float:
        """Cache fix overhead, the share of tokens to read again: CFO = clip(α CCI (1 - β'), 0, 1)."""
        return min(1.0, max(0.0, alpha * self.impact * (1 - self.overlap(before))))

    def chosen(self, before: Sequence[str], most: float = 1.0, alpha: float = ALPHA) -> Tensor:
        """The ceil(min(CFO, most) × n) tokens to read again, ascending, int64."""
        count = math.ceil(min(most, self.overhead(before, alpha)) * self.inter.shape[1] - 1e-9)
        return self.ranking[:count].sort().values


def save(variant: ChunkVariant, file: Path, model_id: Mapping[str, Any]) -> None:
    """Writes a variant in the .keep format, whole or not at all; model_id: the model's identity (`identity.of_model`).

    Raises:
        InputError: if the file cannot be written.
    """
    keys = variant.recomputed.keys
    values = variant.recomputed.values
    tensors = {"inter": variant.inter, "intra": variant.intra}
    for index in range(len(keys)):
        tensors[f"{index}.keys"] = keys[index]
        tensors[f"{index}.values"] = values[index]
    fields = {"before": variant.before, "sizes": variant.sizes, "start": variant.start, "layers": len(keys)}
    write(file, {"variant": fields, "model": dict(model_id)}, tensors)


def load(file: Path, model_id: Mapping[str, Any], device: torch.device | str = "cpu") -> ChunkVariant:
    """The variant of a file.

    Raises:
        InputError: for a file that holds no variant, is damaged, or is another model's.
    """
    contents = Contents(file)
    try:
        identity.check(str(file), schema.mapping(contents.header["model"]), model_id)
        fields = schema.mapping(contents.header["variant"])
        before = tuple(map(schema.text, schema.sequence(fields["before"])))
        sizes = tuple(schema.whole(size) for size in schema.sequence(fields["sizes"]))
        start = schema.whole(fields["start"], 0, MOST_TOKENS)
        layers = schema.whole(fields["layers"], 1, len(contents.header["tensors"]))
        if len(before) != len(sizes) or sum(sizes) != start:
            raise ValueError
    except (KeyError, ValueError) as error:
        raise contents.broken("its header does not describe a variant") from error
    inter = contents.take("inter", layers, None, len(sizes), dtype=torch.float32)
    count = inter.shape[1]
    intra = contents.take("intra", layers, count, dtype=torch.float32)
    keys = tuple(contents.take(f"{index}.keys", 1, None, count, None).to(device) for index in range(layers))
    values = tuple(contents.take(f"{index}.values", 1, None, count, None).to(device) for index in range(layers))
    tokens = torch.arange(count, device=device)
    taken = (torch.ones_like(tokens, dtype=torch.bool),) * layers
    recomputed = Recomputed(tokens, keys, values, taken, queries=(), scale=1.0)
    return ChunkVariant(before, sizes, start, inter.to(device), intra.to(device), recomputed)


def best(variants: Sequence[ChunkVariant], before: Sequence[str]) -> ChunkVariant:
    """The variant that needs least repair behind texts of the given names.

    Raises:
        InputError: if there is none.
    """
    if not variants:
        raise InputError("no variant of this text: read it behind other texts first")
    return min(variants, key=lambda variant: variant.overhead(before))


@torch.no_grad()
def observe(
    model: PreTrainedModel, cache: KeepCache, ends: Sequence[int], names: Sequence[str], text: ReusedText
) -> ChunkVariant:
    """Reads a text behind other texts and makes a variant of it.

    Args:
        model: The model.
        cache: Holds the other texts, uncompressed; it is not changed.
        ends: Where each of them ends, in tokens.
        names: What they are called.
        text: The text.

    Raises:
        InputError: if the other texts are compressed.
    """
    if any(layer.slots is not None for layer in cache.keep_layers):
        raise InputError("attention to texts can be counted only while they are not compressed")
    attention: list[tuple[Tensor, Tensor]] = []

    class CountingLayer(RecomputedLayer):
        """Notes the attention that the text pays in a layer."""

        def attend(self, query: Tensor, mask: Tensor | None, scale: float, new: int, softmax: Softmax = PLAIN) -> Tensor:
            attention.append(_attention_paid(query, self.keys, self.sees(query.device), scale, [0, *ends], softmax))
            return super().attend(query, mask, scale, new, softmax)

    recomputed = recompute(model, cache, text, 1.0, layer_type=CountingLayer)
    inter, intra = (torch.stack(x) for x in zip(*attention, strict=True))
    sizes = tuple(end - start for start, end in pairwise([0, *ends]))
    return ChunkVariant(tuple(names), sizes, cache.get_seq_length(), inter, intra, recomputed)


def _attention_paid(
    query: Tensor, keys: Tensor, sees: Tensor, scale: float, bounds: Sequence[int], softmax: Softmax
) -> tuple[Tensor, Tensor]:
    """Attention of query [1, HG, n, d] to the columns between bounds, [n, j], and after the last, [n]: means over heads."""
    group = query.shape[1] // keys.shape[1]
    wide = keys[0].float().transpose(-1, -2)
    step = max(1, _TILE // (query.shape[1] * keys.shape[2]))
    sinks = softmax.of_groups(len(wide))
    tiles = []
    for lo in range(0, query.shape[2], step):
        rows = query[0, :, lo : lo + step].float().reshape(len(wide), group, -1, query.shape[-1]) * scale
        logits = softmax.capped(rows @ wide[:, None]).masked_fill_(~sees[..., lo : lo + step, :], -torch.inf)
        share = shares(logits, None if sinks is None else sinks[..., None]).mean((0, 1))
        edges = pairwise([*bounds, share.shape[-1]])
        tiles.append(torch.stack([share[:, start:end].sum(-1) for start, end in edges], -1))
    paid = torch.cat(tiles)
    return paid[:, :-1], paid[:, -1]
