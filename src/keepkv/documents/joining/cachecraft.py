"""Cache-Craft, arXiv 2502.15734: how many tokens of a reused text must be read again, and which.

A variant is a text as it stood behind other texts once, with the attention it paid them. Where it is used again, it needs the
less repair the less it looked at other texts, and the more of those it looked at are before it again, in the same order.
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

from keepkv.cache import KeepCache
from keepkv.documents import format, identity
from keepkv.documents.joining.cacheblend import Again, Renewed, Text, renew
from keepkv.errors import InputError

ALPHA = 1.0  # the paper tunes it on validation texts; more reads more again
_TILE = 1 << 24  # logits held at once


@dataclass(frozen=True)
class Variant:
    """A text of n tokens as it stood behind others, from position start on. before: their keys, in order; sizes: their tokens.

    inter [L, n, j]: the attention that each token paid to each of them, a mean over heads, in every layer; intra [L, n]: to the
    text itself; renewed: its keys and values there.
    """

    before: tuple[str, ...]
    sizes: tuple[int, ...]
    start: int
    inter: Tensor
    intra: Tensor
    renewed: Renewed

    @property
    def impact(self) -> float:
        """Chunk context impact, section 3.2: sigmoid(a / b), the attention per pair of tokens to other texts and to itself."""
        count = self.inter.shape[1]
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        outside = (self.inter.double().sum(1) / (count * sizes)).sum(-1).mean()
        inside = (self.intra.double().sum(-1) / count**2).mean()
        return float(torch.sigmoid(outside / inside))

    @property
    def ranking(self) -> Tensor:
        """Tokens, those first that paid most attention to other texts."""
        return self.inter.sum((0, 2)).argsort(descending=True, stable=True)

    def overlap(self, before: Sequence[str]) -> float:
        """beta' = beta (1 - gamma): the share of its attention to others that goes to texts which are before it again, less
        where their order changed (gamma: the share of pairs that changed places, 0 for fewer than two common texts)."""
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
        """Cache fix overhead, the share of tokens to read again: CFO = clip(alpha CCI (1 - beta'), 0, 1)."""
        return min(1.0, max(0.0, alpha * self.impact * (1 - self.overlap(before))))

    def chosen(self, before: Sequence[str], most: float = 1.0, alpha: float = ALPHA) -> Tensor:
        """The ceil(min(CFO, most) n) tokens to read again, ascending."""
        count = math.ceil(min(most, self.overhead(before, alpha)) * self.inter.shape[1] - 1e-9)
        return self.ranking[:count].sort().values


def save(variant: Variant, file: Path, model: Mapping[str, Any]) -> None:
    """Writes a variant like a .keep file: whole or not at all; model: the model's identity (`files.identity`)."""
    told = {"before": variant.before, "sizes": variant.sizes, "start": variant.start, "layers": len(variant.renewed.keys)}
    tensors = {"inter": variant.inter, "intra": variant.intra}
    for index, pair in enumerate(zip(variant.renewed.keys, variant.renewed.values, strict=True)):
        tensors[f"{index}.keys"], tensors[f"{index}.values"] = pair
    format.write(file, {"variant": told, "model": dict(model)}, tensors)


def load(file: Path, model: Mapping[str, Any], device: torch.device | str = "cpu") -> Variant:
    """The variant of a file, mapped into memory. Raises InputError for another file, a damaged one, or another model's."""
    contents = format.Contents(file)
    try:
        identity.check(str(file), contents.header["model"], model)
        told = contents.header["variant"]
        before, sizes = tuple(map(str, told["before"])), tuple(map(int, told["sizes"]))
        start, layers = int(told["start"]), int(told["layers"])
        if len(before) != len(sizes) or sum(sizes) != start:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise contents.broken("its header does not describe a variant") from error
    inter = contents.take("inter", layers, None, len(sizes), dtype=torch.float32)
    count = inter.shape[1]
    intra = contents.take("intra", layers, count, dtype=torch.float32)
    keys, values = (
        tuple(contents.take(f"{index}.{part}", 1, None, count, None).to(device) for index in range(layers))
        for part in ("keys", "values")
    )
    tokens = torch.arange(count, device=device)
    taken = (torch.ones_like(tokens, dtype=torch.bool),) * layers
    return Variant(before, sizes, start, inter.to(device), intra.to(device), Renewed(tokens, keys, values, taken, (), 1.0))


def best(variants: Sequence[Variant], before: Sequence[str]) -> Variant:
    """The variant that needs least repair. Raises InputError if there is none."""
    if not variants:
        raise InputError("no variant of this text: read it behind other texts first")
    return min(variants, key=lambda variant: variant.overhead(before))


@torch.no_grad()
def observe(model: PreTrainedModel, cache: KeepCache, ends: Sequence[int], keys: Sequence[str], text: Text) -> Variant:
    """Reads a text behind the texts in `cache`, uncompressed, whose ends in tokens and keys are given, and makes a variant."""
    if any(layer.slots is not None for layer in cache.keep_layers):
        raise InputError("attention to texts can be counted only while they are not compressed")
    counted: list[tuple[Tensor, Tensor]] = []

    class Counting(Again):
        def attend(self, query: Tensor, mask: Tensor | None, scale: float, new: int) -> Tensor:
            counted.append(_paid(query, self.keys, self.sees(query.device), scale, [0, *ends]))
            return super().attend(query, mask, scale, new)

    renewed = renew(model, cache, text, 1.0, layer_type=Counting)
    inter, intra = (torch.stack(x) for x in zip(*counted, strict=True))
    sizes = tuple(b - a for a, b in pairwise([0, *ends]))
    return Variant(tuple(keys), sizes, cache.get_seq_length(), inter, intra, renewed)


def _paid(query: Tensor, keys: Tensor, sees: Tensor, scale: float, bounds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Attention of query [1, HG, n, d] to the columns between bounds, [n, j], and after the last, [n]: means over heads."""
    group = query.shape[1] // keys.shape[1]
    wide = keys[0].float().transpose(-1, -2)
    step = max(1, _TILE // (query.shape[1] * keys.shape[2]))
    found = []
    for lo in range(0, query.shape[2], step):
        rows = query[0, :, lo : lo + step].float().reshape(len(wide), group, -1, query.shape[-1]) * scale
        logits = (rows @ wide[:, None]).masked_fill_(~sees[..., lo : lo + step, :], -torch.inf)
        share = logits.softmax(-1).mean((0, 1))
        found.append(torch.stack([share[:, a:b].sum(-1) for a, b in pairwise([*bounds, share.shape[-1]])], -1))
    paid = torch.cat(found)
    return paid[:, :-1], paid[:, -1]
