"""Index: what a few heads' keys were, of every token that was compressed, so that a question can be looked up in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from keepkv.errors import KeepKVError
from keepkv.slots.by_channel import QuantizedByChannel
from keepkv.types import CopyingHead

if TYPE_CHECKING:
    from keepkv.cache.layer import KeepLayer

BITS = 4  # fewer point worse, and more no better: docs/notes/lookback.md
MOST = 4  # heads: one that copies well says where to look, and four of them agree
LEAST = 0.5  # share of the best head's share: weaker ones look elsewhere, too


@dataclass(frozen=True)
class Index:
    """The keys of a few KV heads for every token that the slots stand for, as integers of 4 bits.

    Adding to it gives a new one, which shares the older tensors.

    Attributes:
        heads: Whose keys these are.
        parts: For every stretch of tokens, one after the other, the keys of each head, [n, d].
    """

    heads: tuple[CopyingHead, ...]
    parts: tuple[tuple[QuantizedByChannel, ...], ...] = ()

    @staticmethod
    def by(heads: Sequence[CopyingHead]) -> Index:
        """An empty index by the best of these heads: at most four, each with half of the best one's share or more."""
        return Index(tuple(head for head in heads if head.share >= LEAST * heads[0].share)[:MOST])

    @property
    def tokens(self) -> int:
        """Tokens in it, from the text's first one on."""
        return sum(len(part[0]) for part in self.parts)

    @property
    def bytes(self) -> int:
        """Bytes of all codes and their grids."""
        return sum(x.numel() * x.element_size() for part in self.parts for stack in part for x in stack.tensors)

    def add(self, layers: Sequence[KeepLayer], tail: int) -> Index:
        """With the exact tokens that these layers hold, but for the newest `tail`. Raises KeepKVError for a batch."""
        size = layers[0].tail - tail
        if size <= 0:
            return self
        if len(layers[0].keys) > 1:
            raise KeepKVError("an index is of one text: read the rows of a batch one by one, or with lookback='off'")
        stretch = (layers[head.layer].keys[0, head.head, :size] for head in self.heads)
        return replace(self, parts=(*self.parts, tuple(QuantizedByChannel.of(keys, BITS, [size]) for keys in stretch)))

    def keys(self, number: int) -> list[Tensor]:
        """The keys of the number-th head, [n, d] for every stretch."""
        return [part[number].read() for part in self.parts]

    def emptied(self) -> Index:
        """By the same heads, of no text."""
        return replace(self, parts=())
