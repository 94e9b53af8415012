"""Gather: the observations that a compression starts from, made of what the layers hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from keepkv.layer import KeepLayer
from keepkv.types import Observation


class Observations(Sequence[Observation]):
    """One batch row's Observation of every layer, made when it is looked at and not kept: one layer's work space.

    keep: spans of positions, and tail: the newest tokens, that must stay. exact: all tokens as they were, from the layers'
    history, instead of the slots and the tail.
    """

    def __init__(
        self, layers: Sequence[KeepLayer], row: int, inv_freq: Tensor, keep: Sequence[tuple[int, int]], tail: int,
        exact: bool = False,
    ) -> None:  # fmt: skip
        self._layers, self._row, self._inv_freq = layers, row, inv_freq
        self._keep, self._tail, self._exact = keep, tail, exact

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        layer = self._layers[index]
        assert layer.watch is not None, "compress() looks first"
        seen = layer.watch.observation(self._row, layer.held, self._inv_freq)
        if self._exact:
            assert layer.history is not None, "refresh() looks first"
            start = layer.watch.starts[self._row]
            keys, values = (x[:, start:] for x in layer.history.row(self._row, layer.keys, layer.values))
            seen = replace(seen, keys=keys, values=values, recall=layer.exact_recall(), bias=None, places=None, read=None)
        if not self._keep and not self._tail:
            return seen
        places = seen.positions
        stay = places >= seen.tokens - self._tail
        for first, last in self._keep:
            stay = stay | ((places >= first) & (places < last))
        return replace(seen, keep=stay & seen.present)
