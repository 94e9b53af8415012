"""Texts with a common lead, read and compressed one by one."""

from __future__ import annotations

import torch

from helpers import tokens
from keepkv import KeepCache
from keepkv.documents.document import Document
from keepkv.documents.joining import cachecraft
from keepkv.documents.joining.cacheblend import ReusedText
from keepkv.slots.slots import Slots

LEAD = 5
LENGTHS = (40, 33, 37)


def read(model, ids: torch.Tensor, budget: float = 1.0, method: str = "full", slot_dtype: str = "float") -> KeepCache:
    cache = KeepCache(model, budget, method, slot_dtype=slot_dtype, auto=False)
    model(ids, past_key_values=cache)
    return cache.compress()


def whole(model, ids: torch.Tensor) -> KeepCache:
    cache = KeepCache(model, auto=False)
    model(ids, past_key_values=cache)
    return cache


def texts() -> list[torch.Tensor]:
    lead = tokens(1, LEAD, seed=99)
    return [torch.cat([lead, tokens(1, length - LEAD, seed=n)], 1) for n, length in enumerate(LENGTHS)]


def documents(model, budget: float = 1.0, method: str = "full", slot_dtype: str = "float") -> list[Document]:
    made = []
    for ids in texts():
        whole = read(model, ids)
        exact = [(layer.keys, layer.values) for layer in whole.keep_layers].__getitem__
        made.append(Document(read(model, ids, budget, method, slot_dtype), ids, LEAD, "", "", exact=exact))
    return made


def prompt() -> torch.Tensor:
    first, *others = texts()
    return torch.cat([first, *(ids[:, LEAD:] for ids in others)], 1)


def split(slots: Slots) -> tuple[torch.Tensor, ...]:
    return torch.split(slots.positions, slots.counts)


def _behind(model, first: Document, second: Document) -> cachecraft.ChunkVariant:
    return cachecraft.observe(model, first.cache, [LENGTHS[0]], ["a"], ReusedText(second.ids[:, LEAD:], lambda i: (
        second.exact(i)[0][:, :, LEAD:], second.exact(i)[1][:, :, LEAD:])))  # fmt: skip
