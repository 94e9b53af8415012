"""Pack: a cache of one text as named tensors and what is to be known of them, and a cache made of them again.

Names: layer.3.keys and .values are the exact tail [1, H, n, d] (or, of a sliding window, all it holds); layer.3.slots.bias,
.positions [total], .offsets [H + 1], .keys, .values [total, d]. Keys that are quantized are layer.3.slots.keys.codes and
.steps, see `Quantized`. Keys that two layers share are layer.3.slots.keys.0.places, .norms [n] and directions.0 [m, d], once
for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.cache import KeepCache
from keepkv.cache.layer import KeepLayer
from keepkv.cache.report import Head, Report
from keepkv.documents.format import Contents
from keepkv.errors import InputError
from keepkv.models import families
from keepkv.slots.quantized import SLOT_DTYPES, Quantized
from keepkv.slots.shared import Block, Shared
from keepkv.slots.slots import Slots
from keepkv.slots.vectors import Stack


def pack(cache: KeepCache) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a cache. Raises InputError for a batch, padding, or a cache that has read nothing."""
    first = cache.keep_layers[0]
    if not first.is_initialized or not first.seen:
        raise InputError("this cache has read nothing yet: there is nothing to save")
    if len(first.keys) != 1 or any(cache.starts):
        raise InputError("a file holds one text: save the rows of a batch, without padding, each from a cache of its own")
    tensors: dict[str, Tensor] = {}
    directions: dict[tuple[Any, ...], str] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        name = f"layer.{index}"
        tensors[f"{name}.keys"], tensors[f"{name}.values"] = layer.keys, layer.values
        told: dict[str, Any] = {"slots": None}
        if not isinstance(layer, KeepLayer):
            told = {"window": layer.sliding_window}
        elif layer.slots is not None:
            slots = layer.slots
            tensors[f"{name}.slots.bias"], tensors[f"{name}.slots.positions"] = slots.bias, slots.positions
            tensors[f"{name}.slots.offsets"] = torch.tensor(slots.offsets)
            told["slots"] = {}
            for part in ("keys", "values"):
                told["slots"][part] = _put(tensors, directions, f"{name}.slots.{part}", getattr(slots, part))
        layers.append(told)
    return {"seen": first.seen, "layers": layers, "report": _told(cache.report())}, tensors


def unpack(contents: Contents, model: PreTrainedModel, device: torch.device) -> KeepCache:
    """The cache of a file, on a device: what it reads from now on stays exact. Raises InputError for what does not fit."""
    header = contents.header
    cache = KeepCache(model, 1.0, "full", auto=False)
    parts = _Parts(contents, device, families.key_shape(model))
    try:
        seen, layers, told = int(header["seen"]), header["layers"], dict(header["report"])
        if len(layers) != len(cache.layers) or seen < 1:
            raise ValueError
        for index, (layer, facts) in enumerate(zip(cache.layers, layers, strict=True)):
            parts.fill(f"layer.{index}", layer, facts, seen)
        heads = tuple(tuple(tuple(Head(*head) for head in layer) for layer in row) for row in told.pop("heads"))
        if "form" in told:  # before format 4
            told["slot_dtype"] = told.pop("form")
        cache.restore(Report(heads=heads, tokens=tuple(told.pop("tokens")), **told))
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise contents.broken("it does not describe a cache of this model") from error
    return cache


def _put(tensors: dict[str, Tensor], directions: dict[tuple[Any, ...], str], name: str, stack: Stack) -> list[str] | str:
    """Puts keys or values among the tensors; returns the format's name, or of shared ones that of each block's directions."""
    if isinstance(stack, Tensor):
        tensors[name] = stack
        return "float"
    if isinstance(stack, Quantized):
        tensors[f"{name}.codes"], tensors[f"{name}.steps"] = stack.codes, stack.steps
        return stack.slot_dtype.name
    assert isinstance(stack, Shared)
    names = []
    for number, block in enumerate(stack.blocks):
        same = (block.directions.data_ptr(), tuple(block.directions.shape))
        found = directions.setdefault(same, f"directions.{len(directions)}")
        tensors[found] = block.directions
        tensors[f"{name}.{number}.places"], tensors[f"{name}.{number}.norms"] = block.places, block.norms
        names.append(found)
    return names


class _Parts:
    """Takes layers out of a file, on a device; anything that does not fit together raises ValueError or InputError."""

    def __init__(self, contents: Contents, device: torch.device, shape: tuple[int, int]) -> None:
        self._contents, self._device, self._shape = contents, device, shape
        self._directions: dict[str, Tensor] = {}  # those of two layers are one tensor again

    def fill(self, name: str, layer: Any, facts: Mapping[str, Any], seen: int) -> None:
        heads, width = self._shape
        keys = self._take(f"{name}.keys", 1, heads, None, width)
        size = keys.shape[2]
        values = self._take(f"{name}.values", 1, heads, size, width, dtype=keys.dtype)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if not isinstance(layer, KeepLayer):
            if facts["window"] != layer.sliding_window or size != min(seen, layer.sliding_window - 1):
                raise ValueError
            layer.cumulative_length = seen
            return
        layer.seen = seen
        if facts["slots"] is not None:
            layer.slots = self._slots(f"{name}.slots", facts["slots"], heads, width, keys.dtype, seen)
        if size > seen or (layer.slots is None and size != seen):
            raise ValueError

    def _slots(self, name: str, facts: Mapping[str, Any], heads: int, width: int, dtype: torch.dtype, seen: int) -> Slots:
        bias = self._take(f"{name}.bias", None, dtype=torch.float32)
        positions = self._take(f"{name}.positions", len(bias), dtype=torch.int32)
        offsets = self._take(f"{name}.offsets", heads + 1, dtype=torch.int64)
        rising = bool((offsets.diff() >= 0).all()) and int(offsets[0]) == 0 and int(offsets[-1]) == len(bias)
        if not rising or (len(bias) and not 0 <= int(positions.min()) <= int(positions.max()) < seen):
            raise ValueError
        keys, values = (
            self._stack(f"{name}.{part}", facts[part], len(bias), width, dtype) for part in ("keys", "values")
        )  # fmt: skip
        return Slots(keys, values, bias, positions, tuple(offsets.tolist()))

    def _stack(self, name: str, directions: list[str] | str, count: int, width: int, dtype: torch.dtype) -> Stack:
        if not directions or directions == "float":  # [] before format 3
            return self._take(name, count, width, dtype=dtype)
        if isinstance(directions, str):
            slot_dtype = SLOT_DTYPES[directions]
            codes = self._take(f"{name}.codes", count, slot_dtype.bytes(width, 0) - 2, dtype=torch.uint8)
            steps = self._take(f"{name}.steps", count, dtype=torch.bfloat16)
            return Quantized(codes, steps, slot_dtype, width, dtype)
        blocks = []
        for number, found in enumerate(directions):
            if found not in self._directions:
                self._directions[found] = self._take(found, None, width, dtype=dtype)
            shared = self._directions[found]
            places = self._take(f"{name}.{number}.places", None, dtype=torch.int32)
            norms = self._take(f"{name}.{number}.norms", len(places))
            if len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(shared):
                raise ValueError
            blocks.append(Block(shared, places, norms))
        stack = Shared(tuple(blocks))
        if len(stack) != count:
            raise ValueError
        return stack

    def _take(self, name: str, *shape: int | None, dtype: torch.dtype | None = None) -> Tensor:
        return self._contents.take(name, *shape, dtype=dtype).to(self._device)


def _told(report: Report) -> dict[str, Any]:
    """A report for the header: what the compression made of the text; what is held is counted anew when it is loaded."""
    heads = [
        [[[h.slots, h.error, h.mass_error, h.evict_error, h.fallbacks, h.max_vote] for h in layer] for layer in row]
        for row in report.heads
    ]
    names = ("method", "budget", "compress_seconds", "repeat_seconds", "longest_pause", "compressions", "note", "slot_dtype")
    return {"heads": heads, "tokens": list(report.tokens), **{name: getattr(report, name) for name in names}}
