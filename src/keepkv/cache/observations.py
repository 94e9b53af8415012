"""Gather: the observations that a compression starts from, made of what the layers hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from keepkv.cache.layer import KeepLayer
from keepkv.errors import KeepKVError
from keepkv.methods import Method
from keepkv.slots.quantized import FLOAT, SlotDtype
from keepkv.types import Observation


def check_observed(method: Method, layers: Sequence[KeepLayer], slot_dtype: SlotDtype = FLOAT) -> None:
    """Raises KeepKVError if the method needs what the layers have not observed while they read, or cannot be stored so."""
    if method.layer_pairs and slot_dtype.bits:
        raise KeepKVError(
            f"{method.name} stores the slots of two layers together, and these cannot be {slot_dtype.name}: slot_dtype='float'"
        )
    watches = [layer.watch for layer in layers if layer.watch is not None]
    if method.column_mass and not all(watch.with_column_mass for watch in watches):
        raise KeepKVError(f"{method.name} must see all attention while the prompt is read: KeepCache(..., column_mass=True)")
    how, unseen = method.repeat, any(watch.repeat_peak is None for watch in watches)
    if how is not None and how.needed and (unseen or (how.queries and any(watch.repeated is None for watch in watches))):
        raise KeepKVError(
            f"{method.name} must see the text repeated before it is compressed: cache.read(model, input_ids); or "
            "KeepCache(..., auto=False), a forward pass, cache.repeat(model, input_ids), cache.compress()"
        )


class Observations(Sequence[Observation]):
    """One batch row's Observation of every layer, made when it is looked at and not kept: one layer's work space.

    projections: every layer's output projection [D, heads × d_v], or None. keep: spans of positions, and tail: the newest
    tokens, that must stay. exact: all tokens as they were, from the layers' history, instead of the slots and the tail.
    """

    def __init__(
        self, layers: Sequence[KeepLayer], row: int, inv_freq: Tensor, projections: Sequence[Tensor | None],
        keep: Sequence[tuple[int, int]] = (), tail: int = 0, exact: bool = False,
    ) -> None:  # fmt: skip
        self._layers, self._row, self._inv_freq, self._projections = layers, row, inv_freq, projections
        self._keep, self._tail, self._exact = keep, tail, exact

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        layer = self._layers[index]
        assert layer.watch is not None, "compress() looks first"
        seen = layer.watch.observation(self._row, layer.state, self._inv_freq)
        if self._exact:
            assert layer.backing is not None, "refresh() looks first"
            start = layer.watch.starts[self._row]
            keys, values = (x[:, start:] for x in layer.backing.row(self._row, layer.keys, layer.values))
            seen = replace(
                seen, keys=keys, values=values, repeat_peak=layer.exact_repeat_peak(), bias=None, key_positions=None, read=None
            )
        weight = self._projections[index]
        if weight is not None:
            heads, group, size = seen.heads, seen.queries.shape[1], seen.values.shape[2]
            seen = replace(seen, projection=weight.view(-1, heads, group, size).permute(1, 2, 3, 0))
        if not self._keep and not self._tail:
            return seen
        places = seen.positions
        stay = places >= seen.tokens - self._tail
        for first, last in self._keep:
            stay = stay | ((places >= first) & (places < last))
        return replace(seen, keep=stay & seen.present)
