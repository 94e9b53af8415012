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
class HeadSlots:
    """One compressed KV head.

    Attributes:
        layer: The model's own index of its layer.
        head: Its index in the layer.
        result: What the compression reported of it.
        positions: The token that each slot's key comes from, ascending.
        votes: Each slot's vote.
    """

    layer: int
    head: int
    result: Head
    positions: tuple[int, ...]
    votes: tuple[float, ...]


@dataclass(frozen=True)
class Anatomy:
    """One text, compressed.

    Attributes:
        model: What the model is called.
        repeated: Whether the text was repeated before.
        report: Of the cache.
        tokens: The text, token by token.
        heads: Every compressed head, layer by layer.
    """

    model: str
    repeated: bool
    report: Report
    tokens: tuple[str, ...]
    heads: tuple[HeadSlots, ...]

    @property
    def layers(self) -> list[list[HeadSlots]]:
        """The heads of each compressed layer."""
        return [list(heads) for _, heads in groupby(self.heads, lambda head: head.layer)]

    @property
    def judged(self) -> bool:
        """Whether queries were held out, so that there are errors to show."""
        return any(head.result.evict_error > 0 for head in self.heads)

    @property
    def fallen(self) -> int:
        """How many heads fell back to a simpler rule."""
        return sum(head.result.fallbacks > 0 for head in self.heads)

    @property
    def evict_error(self) -> float:
        """The mean error, had all heads been evicted."""
        return fmean(head.result.evict_error for head in self.heads)

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
        """What `keepkv inspect --json` prints."""
        report = self.report
        unknown = {} if self.judged else dict.fromkeys(("error", "mass_error", "evict_error"))
        return {
            "model": self.model,
            "method": report.method,
            "budget": report.budget,
            "repeated": self.repeated,
            "slots_per_head": report.slots_per_head,
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
                    **asdict(head.result),
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    name: str,
    recipe: Recipe | None = None,
    phase: Phase = silent,
) -> Anatomy:
    """Reads a text at once and compresses it: its anatomy.

    Args:
        model: Any supported model.
        tokenizer: Its tokenizer.
        prompt: The text.
        name: What the model is called.
        recipe: How the text is compressed.
        phase: Told what is under way.

    Raises:
        BudgetError, MethodError, InputError: for a recipe that this text cannot be compressed with, or keeps whole.
    """
    recipe = recipe or Recipe()
    recipe.refuse("an inspection", "exact", "lookback", *(["chunk"] if recipe.chunk else []))
    torch.manual_seed(recipe.seed)
    method = methods.get(recipe.method)
    ids = prompt.text.to(model.device)
    spans = prompt.spans(*recipe.keep)
    reading = read(model, ids, [method], recipe, prompt.question(REPEAT).to(model.device), phase)
    cache = reading.of(method).compress(recipe.budget, method, phase(f"compressing ({method.name})"), spans)
    return of(cache, token_texts(tokenizer, ids[0].tolist()), name, reading.is_repeated(method))


def of(cache: KeepCache, tokens: Sequence[str], model: str = "", repeated: bool = False) -> Anatomy:
    """The anatomy of a compressed cache of one row that has read `tokens`.

    Raises:
        InputError: if nothing was compressed.
    """
    report = cache.report()
    if not report.heads:
        raise InputError(f"there is nothing to inspect ({report.note}): give a smaller budget, or another method")
    heads = []
    layers = [(index, layer) for index, layer in enumerate(cache.layers) if isinstance(layer, KeepLayer)]
    for (index, layer), results in zip(layers, report.heads[0], strict=True):
        assert layer.slots is not None
        positions = layer.slots.positions.tolist()
        votes = layer.slots.bias.exp().tolist()
        for head, (lo, hi) in enumerate(pairwise(layer.slots.offsets)):
            heads.append(HeadSlots(index, head, results[head], tuple(positions[lo:hi]), tuple(votes[lo:hi])))
    return Anatomy(model, repeated, report, tuple(tokens), tuple(heads))


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, as it is read. A character of several tokens belongs to the last of them."""

    def decode(lo: int, hi: int) -> str:
        return str(tokenizer.decode(list(ids[lo:hi]), clean_up_tokenization_spaces=False))

    texts = []
    before = 0  # what is decoded starts a piece earlier: alone, a word would lose its space
    start = 0
    for end in range(1, len(ids) + 1):
        text = decode(before, end)
        if text.endswith(_CUT) and end - start < _LONGEST and end < len(ids):
            texts.append("")
        else:
            texts.append(text[len(decode(before, start)) :])
            before = start
            start = end
    return texts
