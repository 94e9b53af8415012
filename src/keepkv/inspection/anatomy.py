"""Anatomy: what a compression made of one text, per layer, KV head and token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv import methods
from keepkv.cache import KeepCache
from keepkv.cache.layer import KeepLayer
from keepkv.cache.report import Head, Report
from keepkv.errors import InputError
from keepkv.recipe import Recipe
from keepkv.text.prompt import Prompt
from keepkv.text.reading import REPEAT, Phase, read, silent

_CUT = "\ufffd"  # what decoding gives for a piece of a character
_LONGEST = 8  # tokens of one character


@dataclass(frozen=True)
class Slotted:
    """One compressed KV head: the token that each slot's key comes from, ascending, and each slot's vote."""

    layer: int
    head: int
    made: Head
    positions: tuple[int, ...]
    votes: tuple[float, ...]


@dataclass(frozen=True)
class Anatomy:
    """One text, compressed. tokens: the text piece by piece; heads: layer by layer, with the model's own layer indices."""

    model: str
    repeated: bool
    report: Report
    tokens: tuple[str, ...]
    heads: tuple[Slotted, ...]

    @property
    def layers(self) -> list[list[Slotted]]:
        """The heads of each compressed layer."""
        return [list(heads) for _, heads in groupby(self.heads, lambda head: head.layer)]

    @property
    def judged(self) -> bool:
        """Whether queries were held out, so that there are errors to show."""
        return any(head.made.evict_error > 0 for head in self.heads)

    @property
    def fallen(self) -> int:
        """Heads with a fallback."""
        return sum(head.made.fallbacks > 0 for head in self.heads)

    @property
    def evict_error(self) -> float:
        """The mean error, had all heads been evicted."""
        return fmean(head.made.evict_error for head in self.heads)

    @property
    def keepers(self) -> list[int]:
        """Per token, how many heads kept its slot."""
        count = [0] * len(self.tokens)
        for head in self.heads:
            for position in head.positions:
                count[position] += 1
        return count

    @property
    def votes(self) -> list[float]:
        """Per token, the sum of its slots' votes over all heads; in the full cache it is the number of heads."""
        total = [0.0] * len(self.tokens)
        for head in self.heads:
            for position, vote in zip(head.positions, head.votes, strict=True):
                total[position] += vote
        return total

    def to_dict(self) -> dict[str, Any]:
        report, unknown = self.report, {} if self.judged else dict.fromkeys(("error", "mass_error", "evict_error"))
        return {
            "model": self.model,
            "method": report.method,
            "budget": report.budget,
            "repeated": self.repeated,
            "slots": report.slots,
            "kv_bytes_full": report.kv_bytes_full,
            "kv_bytes": report.kv_bytes,
            "error": report.error if self.judged else None,
            "evict_error": self.evict_error if self.judged else None,
            "heads_fallen_back": self.fallen,
            "max_vote": report.max_vote,
            "heads": [
                {
                    "layer": head.layer,
                    "head": head.head,
                    **asdict(head.made),
                    **unknown,
                    "mean_vote": fmean(head.votes) if head.votes else 0.0,
                    "positions": head.positions,
                    "votes": [float(f"{vote:.4g}") for vote in head.votes],
                }
                for head in self.heads
            ],
            "tokens": [{"text": text, "kept": kept} for text, kept in zip(self.tokens, self.keepers, strict=True)],
        }


@torch.inference_mode()
def inspect(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, name: str, recipe: Recipe | None = None,
    phase: Phase = silent,
) -> Anatomy:  # fmt: skip
    """Reads prompt.text at once and compresses it by the recipe; name: what the model is called.

    Raises BudgetError, MethodError, InputError.
    """
    recipe = recipe or Recipe()
    torch.manual_seed(recipe.seed)
    method, ids = methods.get(recipe.method), prompt.text.to(model.device)
    spans = prompt.spans(*recipe.keep)
    reading = read(model, ids, [method], recipe, prompt.question(REPEAT).to(model.device), phase)
    cache = reading.of(method).compress(recipe.budget, method, phase(f"compressing ({method.name})"), spans)
    return of(cache, pieces(tokenizer, ids[0].tolist()), name, reading.is_repeated(method))


def of(cache: KeepCache, tokens: Sequence[str], model: str = "", repeated: bool = False) -> Anatomy:
    """The anatomy of a compressed cache of one row that has read `tokens`. Raises InputError if nothing was compressed."""
    report = cache.report()
    if not report.heads:
        raise InputError(f"there is nothing to inspect ({report.note}): give a smaller budget, or another method")
    heads, layers = [], [(i, layer) for i, layer in enumerate(cache.layers) if isinstance(layer, KeepLayer)]
    for (index, layer), made in zip(layers, report.heads[0], strict=True):
        assert layer.slots is not None
        slots, bounds = layer.slots, layer.slots.offsets
        positions, votes = slots.positions.tolist(), slots.bias.exp().tolist()
        for head, (lo, hi) in enumerate(pairwise(bounds)):
            heads.append(Slotted(index, head, made[head], tuple(positions[lo:hi]), tuple(votes[lo:hi])))
    return Anatomy(model, repeated, report, tuple(tokens), tuple(heads))


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, as it is read; a character of several tokens is its last token's."""

    def decode(lo: int, hi: int) -> str:
        return str(tokenizer.decode(list(ids[lo:hi]), clean_up_tokenization_spaces=False))

    texts, before, start = [], 0, 0  # what is decoded starts a piece earlier: alone, a word would lose its space
    for end in range(1, len(ids) + 1):
        text = decode(before, end)
        if text.endswith(_CUT) and end - start < _LONGEST and end < len(ids):
            texts.append("")
        else:
            texts.append(text[len(decode(before, start)) :])
            before, start = start, end
    return texts
