"""Observations: what a compression starts from, made layer by layer of what the layers hold and have seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from keepkv.cache.layer import KeepLayer
from keepkv.errors import KeepKVError
from keepkv.methods import Method
from keepkv.ops.rope import Rotation
from keepkv.slots.slot_dtype import FLOAT, SlotDtype
from keepkv.types import Observation


def check_observed(method: Method, layers: Sequence[KeepLayer], slot_dtype: SlotDtype = FLOAT) -> None:
    """Raises KeepKVError if the method needs what the layers have not observed while they read, or cannot be stored so."""
    if method.layer_pairs and slot_dtype.rounds:
        raise KeepKVError(
            f"{method.name} stores the slots of two layers together, and these cannot be {slot_dtype.name}: slot_dtype='float'"
        )
    watches = [layer.watch for layer in layers if layer.watch is not None]
    if method.column_mass and not all(watch.with_column_mass for watch in watches):
        raise KeepKVError(f"{method.name} must see all attention while the prompt is read: KeepCache(..., column_mass=True)")
    how = method.repeat
    if how is None or not how.needed:
        return
    if any(watch.repeat_peak is None or (how.queries and watch.repeated is None) for watch in watches):
        raise KeepKVError(
            f"{method.name} must see the text repeated before it is compressed: cache.read(model, input_ids); or "
            "KeepCache(..., auto=False), a forward pass, cache.repeat(model, input_ids), cache.compress()"
        )


class Observations(Sequence[Observation]):
    """One batch row's Observation of every layer, made when it is looked at and not kept: memory for one layer is enough.

    Args:
        layers: The compressed layers.
        row: The batch row.
        rotations: How each of them rotates.
        projections: For every layer the output projections [D, heads × d_v] of those that attend to its keys, or None.
        keep: Spans of positions (first, last + 1) that must stay.
        tail: How many of the newest tokens must stay too.
        exact: Whether to observe all tokens as they were, from the layers' backing, instead of slots and tail.
    """

    def __init__(
        self,
        layers: Sequence[KeepLayer],
        row: int,
        rotations: Sequence[Rotation],
        projections: Sequence[tuple[Tensor, ...] | None],
        keep: Sequence[tuple[int, int]] = (),
        tail: int = 0,
        exact: bool = False,
    ) -> None:
        self._layers = layers
        self._row = row
        self._rotations = rotations
        self._projections = projections
        self._keep = keep
        self._tail = tail
        self._exact = exact

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        layer = self._layers[index]
        assert layer.watch is not None, "compress() checks that first"
        observation = layer.watch.observation(self._row, layer.state, self._rotations[index])
        if self._exact:
            assert layer.backing is not None, "refresh() checks that first"
            start = layer.watch.starts[self._row]
            keys, values = layer.backing.row(self._row, layer.keys, layer.values)
            observation = replace(
                observation,
                keys=keys[:, start:],
                values=values[:, start:],
                repeat_peak=layer.exact_repeat_peak(),
                bias=None,
                key_positions=None,
                read=None,
            )
        weights = self._projections[index]
        if weights is not None:
            size = observation.values.shape[2]
            of_groups = [weight.view(len(weight), observation.heads, -1, size).permute(1, 2, 3, 0) for weight in weights]
            projection = of_groups[0] if len(weights) == 1 else torch.cat(of_groups, 1)
            observation = replace(observation, projection=projection)
        if not self._keep and not self._tail:
            return observation
        positions = observation.positions
        stay = positions >= observation.tokens - self._tail
        for first, last in self._keep:
            stay = stay | ((positions >= first) & (positions < last))
        return replace(observation, keep=stay & observation.present)
