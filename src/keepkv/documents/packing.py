"""Packing: a cache of one text as named tensors and a header, and a cache made of them again.

The tensors' names: layer.3.keys and .values are the exact tail [1, H, n, d] (or, of a sliding window, all it holds);
layer.3.conv_states.0 and .recurrent_states.0 are a state [1, ...] of linear attention, Mamba or a convolution;
layer.3.slots.bias, .positions [total], .offsets [H + 1], .keys, .values [total, d]. Keys that are quantized are
layer.3.slots.keys.codes and .steps, see `QuantizedByVector`, or also .lows and .starts, see `QuantizedByChannel`. Keys that two
layers share are layer.3.slots.keys.0.places, .norms [n] and directions.0 [m, d], once for both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv import schema
from keepkv.cache import KeepCache, other_layers
from keepkv.cache.layer import KeepLayer
from keepkv.cache.report import Head, Report
from keepkv.documents.format import MOST_TOKENS, Contents
from keepkv.errors import InputError
from keepkv.models import families
from keepkv.slots.by_channel import QuantizedByChannel
from keepkv.slots.by_vector import QuantizedByVector
from keepkv.slots.cast import Cast
from keepkv.slots.packed import packed_width
from keepkv.slots.shared import Block, Shared
from keepkv.slots.slots import Slots
from keepkv.slots.vectors import Stack

_BY_VECTOR = {"int8": 8, "int4": 4, "int2": 2}  # how it is written in a file, and the bits
_BY_CHANNEL = {f"{name} by channel": bits for name, bits in _BY_VECTOR.items()}


def pack(cache: KeepCache) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a cache.

    What is saved is what was read: slots, exact tail and report. What is not: queries that wait for the next compression, the
    backing's exact keys and values, and settings, so that a loaded cache is not live (`unpack`).

    Raises:
        InputError: for a batch, a padded row, or a cache that has read nothing.
    """
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
        fields: dict[str, Any] = {"slots": None} if isinstance(layer, KeepLayer) else {}
        if isinstance(layer, KeepLayer) or other_layers.has_window(layer):
            tensors[f"{name}.keys"] = layer.keys
            tensors[f"{name}.values"] = layer.values
        for kind, number, state in other_layers.state_tensors(layer):
            tensors[f"{name}.{kind}.{number}"] = state
        if other_layers.has_state(layer):
            fields["states"] = {f"{kind}.{number}": list(x.shape) for kind, number, x in other_layers.state_tensors(layer)}
            fields["read"] = [bool(layer.has_previous_state[number]) for number in range(layer.number_of_states)]
        if other_layers.has_window(layer):
            fields["window"] = layer.sliding_window
        if isinstance(layer, KeepLayer) and layer.slots is not None:
            slots = layer.slots
            tensors[f"{name}.slots.bias"] = slots.bias
            tensors[f"{name}.slots.positions"] = slots.positions
            tensors[f"{name}.slots.offsets"] = torch.tensor(slots.offsets)
            fields["slots"] = {
                "keys": _put(tensors, directions, f"{name}.slots.keys", slots.keys),
                "values": _put(tensors, directions, f"{name}.slots.values", slots.values),
            }
        layers.append(fields)
    return {"seen": first.seen, "layers": layers, "report": _report_fields(cache.report())}, tensors


def unpack(contents: Contents, model: PreTrainedModel, device: torch.device) -> KeepCache:
    """The cache of a file, on a device. It is compressed and not live: what it reads from now on stays exact.

    It reports what the saved one did, but for what is held beside slots and tail: queries and backing are not saved.

    Raises:
        InputError: for what does not fit together, or does not fit the model.
    """
    header = contents.header
    cache = KeepCache(model, 1.0, "full", auto=False)
    dtypes = {weight.dtype for weight in model.parameters()}
    reader = _LayerReader(contents, device, families.key_shape(model), dtypes)
    try:
        seen = schema.whole(header["seen"], 1, MOST_TOKENS)
        layers = schema.sequence(header["layers"], len(cache.layers))
        for index, (layer, fields) in enumerate(zip(cache.layers, layers, strict=True)):
            reader.fill(f"layer.{index}", layer, schema.mapping(fields), seen)
        cache.restore(_report(schema.mapping(header["report"]), len(cache.keep_layers), reader.shape[0]))
    except (KeyError, ValueError) as error:
        raise contents.broken("it does not describe a cache of this model") from error
    return cache


def _put(tensors: dict[str, Tensor], directions: dict[tuple[Any, ...], str], name: str, stack: Stack) -> list[str] | str:
    """Puts keys or values among the tensors.

    Returns:
        How they are stored: "float", "bfloat16", a name of _BY_VECTOR or _BY_CHANNEL; for those that two layers share, the
        names of each block's directions.
    """
    if isinstance(stack, Tensor):
        tensors[name] = stack
        return "float"
    if isinstance(stack, Cast):
        tensors[name] = stack.stored
        return "bfloat16"
    if isinstance(stack, QuantizedByVector | QuantizedByChannel):
        tensors[f"{name}.codes"] = stack.codes
        tensors[f"{name}.steps"] = stack.steps
        if isinstance(stack, QuantizedByVector):
            return next(name for name, bits in _BY_VECTOR.items() if bits == stack.bits)
        tensors[f"{name}.lows"] = stack.lows
        tensors[f"{name}.starts"] = torch.tensor(stack.starts)
        return next(name for name, bits in _BY_CHANNEL.items() if bits == stack.bits)
    assert isinstance(stack, Shared)
    names = []
    for number, block in enumerate(stack.blocks):
        identity = (block.directions.data_ptr(), tuple(block.directions.shape))
        shared_name = directions.setdefault(identity, f"directions.{len(directions)}")
        tensors[shared_name] = block.directions
        tensors[f"{name}.{number}.places"] = block.places
        tensors[f"{name}.{number}.norms"] = block.norms
        names.append(shared_name)
    return names


class _LayerReader:
    """Takes layers out of a file, on a device; anything that does not fit together raises KeyError, ValueError or InputError.

    shape: KV heads of a layer, and the size of a key. dtypes: those of the model's weights.
    """

    def __init__(
        self, contents: Contents, device: torch.device, shape: tuple[int, int], dtypes: Collection[torch.dtype]
    ) -> None:
        self._contents = contents
        self._device = device
        self.shape = shape
        self._dtypes = dtypes
        self._directions: dict[str, Tensor] = {}  # those of two layers are one tensor again

    def fill(self, name: str, layer: Any, fields: Mapping[str, Any], seen: int) -> None:
        """Fills a new layer of a cache."""
        if other_layers.has_state(layer):
            states = {state: self._state(f"{name}.{state}", shape) for state, shape in fields["states"].items()}
            other_layers.fill_state(layer, states, [bool(read) for read in fields["read"]])
        if other_layers.has_window(layer):
            keys = self._take(f"{name}.keys", 1, None, None, None)
            size = keys.shape[2]
            values = self._take(f"{name}.values", 1, keys.shape[1], size, None, dtype=keys.dtype)
            if schema.whole(fields["window"]) != layer.sliding_window or size != min(seen, layer.sliding_window - 1):
                raise ValueError
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            layer.cumulative_length = seen
        if not isinstance(layer, KeepLayer):
            return
        heads, width = self.shape
        keys = self._take(f"{name}.keys", 1, heads, None, width)
        if keys.dtype not in self._dtypes:
            raise ValueError
        size = keys.shape[2]
        values = self._take(f"{name}.values", 1, heads, size, width, dtype=keys.dtype)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layer.seen = seen
        if fields["slots"] is not None:
            layer.slots = self._slots(f"{name}.slots", schema.mapping(fields["slots"]), heads, width, keys.dtype, seen)
        if size > seen or (layer.slots is None and size != seen):
            raise ValueError

    def _slots(self, name: str, fields: Mapping[str, Any], heads: int, width: int, dtype: torch.dtype, seen: int) -> Slots:
        bias = self._take(f"{name}.bias", None, dtype=torch.float32)
        positions = self._take(f"{name}.positions", len(bias), dtype=torch.int32)
        offsets = self._take(f"{name}.offsets", heads + 1, dtype=torch.int64)
        rising = bool((offsets.diff() >= 0).all()) and int(offsets[0]) == 0 and int(offsets[-1]) == len(bias)
        if not rising or (len(bias) and not 0 <= int(positions.min()) <= int(positions.max()) < seen):
            raise ValueError
        keys = self._stack(f"{name}.keys", fields["keys"], len(bias), width, dtype)
        values = self._stack(f"{name}.values", fields["values"], len(bias), width, dtype)
        return Slots(keys, values, bias, positions, tuple(offsets.tolist()))

    def _stack(self, name: str, stored: object, count: int, width: int, dtype: torch.dtype) -> Stack:
        """Keys or values; stored: how, as `_put` returned it."""
        if stored in ("float", []):  # [] before format 3
            return self._take(name, count, width, dtype=dtype)
        if isinstance(stored, str):
            return self._special(name, stored, count, width, dtype)
        blocks = []
        for number, directions in enumerate(map(schema.text, schema.sequence(stored))):
            if directions not in self._directions:
                self._directions[directions] = self._take(directions, None, width, dtype=dtype)
            shared = self._directions[directions]
            places = self._take(f"{name}.{number}.places", None, dtype=torch.int32)
            norms = self._take(f"{name}.{number}.norms", len(places), dtype=torch.promote_types(dtype, torch.float32))
            if len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(shared):
                raise ValueError
            blocks.append(Block(shared, places, norms))
        stack = Shared(tuple(blocks))
        if len(stack) != count:
            raise ValueError
        return stack

    def _special(self, name: str, stored: str, count: int, width: int, dtype: torch.dtype) -> Stack:
        """Keys or values that are stored in another way than they are read; raises KeyError for an unknown one."""
        if stored == "bfloat16":
            return Cast(self._take(name, count, width, dtype=torch.bfloat16), dtype)
        bits = (_BY_VECTOR | _BY_CHANNEL)[stored]
        codes = self._take(f"{name}.codes", count, packed_width(width, bits), dtype=torch.uint8)
        if stored in _BY_VECTOR:
            return QuantizedByVector(codes, self._take(f"{name}.steps", count, dtype=torch.bfloat16), bits, width, dtype)
        starts = tuple(self._take(f"{name}.starts", None, dtype=torch.int64).tolist())
        if not starts or starts[0] != 0 or starts[-1] != count or any(lo > hi for lo, hi in pairwise(starts)):
            raise ValueError
        steps = self._take(f"{name}.steps", len(starts) - 1, width, dtype=torch.bfloat16)
        return QuantizedByChannel(
            codes, steps, self._take(f"{name}.lows", len(starts) - 1, width, dtype=dtype), starts, bits, width
        )

    def _state(self, name: str, shape: Sequence[int]) -> Tensor:
        """A state of one row, of a shape that only the model's code knows."""
        state = self._take(name, *shape)
        if state.dim() < 2 or state.shape[0] != 1 or not state.is_floating_point():
            raise ValueError
        return state

    def _take(self, name: str, *shape: int | None, dtype: torch.dtype | None = None) -> Tensor:
        return self._contents.take(name, *shape, dtype=dtype).to(self._device)


def _report(fields: Mapping[str, Any], layers: int, heads: int) -> Report:
    """The report of a header, for a cache of one row. Raises KeyError or ValueError."""
    rows = schema.sequence(fields["heads"])
    if len(rows) > 1:
        raise ValueError
    tokens = schema.whole(schema.sequence(fields["tokens"], 1)[0], 1, MOST_TOKENS)  # of a shortened document more than it has
    return Report(
        method=schema.text(fields["method"]),
        budget=schema.text(fields["budget"]),
        tokens=(tokens,),
        heads=tuple(
            tuple(tuple(_head(head) for head in schema.sequence(layer, heads)) for layer in schema.sequence(row, layers))
            for row in rows
        ),
        compress_seconds=schema.number(fields["compress_seconds"], 0),
        repeat_seconds=schema.number(fields["repeat_seconds"], 0),
        longest_pause=schema.number(fields["longest_pause"], 0),
        compressions=schema.whole(fields["compressions"]),
        note=schema.text(fields["note"]),
        slot_dtype=schema.text(fields.get("slot_dtype", fields.get("form", "float"))),  # its name before format 4, and before 3
    )


def _head(values: object) -> Head:
    slots, error, mass_error, evict_error, fallbacks, max_vote = schema.sequence(values, 6)
    return Head(
        slots=schema.whole(slots, 0, MOST_TOKENS),
        error=schema.number(error),
        mass_error=schema.number(mass_error),
        evict_error=schema.number(evict_error),
        fallbacks=schema.whole(fallbacks),
        max_vote=schema.number(max_vote, 0),
    )


def _report_fields(report: Report) -> dict[str, Any]:
    """A report for the header: what the compression made of the text. What is held is counted anew when it is loaded."""
    heads = [[[list(astuple(head)) for head in layer] for layer in row] for row in report.heads]
    names = ("method", "budget", "compress_seconds", "repeat_seconds", "longest_pause", "compressions", "note", "slot_dtype")
    return {"heads": heads, "tokens": list(report.tokens), **{name: getattr(report, name) for name in names}}
