"""The .keep format: one safetensors file whose header says what the tensors are, and proves it (docs/format.md).

The metadata of the safetensors header has one entry, "keepkv": JSON with `format` (a number), what the cache knows of itself,
a SHA-256 of every tensor, and `digest`, a SHA-256 of that JSON without it. So a file is refused before any of it is used if a
byte that matters was changed, and no code can be in it. Which tensors there are is said in packing.py.

Nothing is mapped into memory: what is used is a copy that was checked, so that a file may be changed or cut short while it is
used.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from keepkv import schema
from keepkv.errors import InputError
from keepkv.models.identity import digest
from keepkv.paths import atomic_file, open_file

# Older ones are read too. New in 6: the model's configuration; in 5: keys by channel; in 4: names of settings; in 3: quantized
# slots; in 2: a question's frame
FORMAT = 6
MOST_TOKENS = 1 << 24  # of a text: where a file leaves the tokens out, nothing else proves that there were so many
_LARGEST_HEADER = 32 << 20  # bytes; a header is some hundred kilobytes
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class _Place(NamedTuple):
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int  # in bytes


class Contents:
    """An open .keep file: its header, and its tensors, which are read and checked when they are taken.

    The file stays open as long as this is held, so that it may be removed or replaced meanwhile.

    Attributes:
        file: The file.
        header: What the file says of its cache, checked against its digest.

    Raises:
        InputError: for a file that is missing, damaged, altered, of a newer format, or no .keep file at all.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._descriptor = open_file(file)
            weakref.finalize(self, os.close, self._descriptor)
            self._places, signed = self._layout()
        except OSError as error:
            raise self._unreadable(error) from error
        except ValueError as error:
            raise self.broken(str(error)) from error
        try:
            header = schema.parse(schema.text(signed))
            version = schema.whole(header["format"], 1)
        except (ValueError, KeyError) as error:
            raise self.broken("its header says nothing about a cache") from error
        if version > FORMAT:
            raise InputError(
                f"{str(file)!r} was written by a newer keepkv (format {version}, this one reads {FORMAT}): update keepkv"
            )
        expected, tensors = header.pop("digest", None), header.get("tensors")
        if expected != _digest(header) or not isinstance(tensors, dict) or set(self._places) != set(tensors):
            raise self.broken("its header was altered")
        self.header: Mapping[str, Any] = header

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def take(self, name: str, *shape: int | None, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, in memory of its own.

        Args:
            name: The tensor's name.
            shape: What every dimension must be; None is any size.
            dtype: What its dtype must be; None is any.

        Raises:
            InputError: if it is damaged, missing, of another shape or dtype, or holds what is no number (infinite votes apart:
                a slot of none is seen by nobody).
        """
        if name not in self:
            raise self.broken(f"it has no {name}")
        place = self._places[name]
        fits = len(shape) == len(place.shape) and all(a is None or a == b for a, b in zip(shape, place.shape, strict=True))
        if not fits or (dtype is not None and place.dtype != dtype):
            raise self.broken(f"{name} is {list(place.shape)} {place.dtype}, which is not what belongs there")
        raw = torch.empty(place.size, dtype=torch.uint8)
        try:
            self._read(raw.numpy().data, place.start)
        except OSError as error:
            raise self._unreadable(error) from error
        except ValueError as error:
            raise self.broken(str(error)) from error
        tensor = raw.view(place.dtype).view(place.shape)
        if _tensor_digest(tensor) != self.header["tensors"][name]:
            raise self.broken(f"{name} was altered")
        if not _is_sound(name, tensor):
            raise self.broken(f"{name} holds what is no number")
        return tensor

    def check(self) -> None:
        """Reads every tensor once. Raises InputError if one is damaged."""
        for name, place in self._places.items():
            self.take(name, *place.shape)

    def broken(self, why: str) -> InputError:
        """The error for a file that is not what it should be."""
        return InputError(f"{str(self.file)!r} is not a whole .keep file: {why.splitlines()[0]}")

    def _unreadable(self, error: OSError) -> InputError:
        return InputError(
            f"{str(self.file)!r} cannot be read ({error.strerror or error}): expected a file made by keepkv compile"
        )

    def _layout(self) -> tuple[dict[str, _Place], object]:
        """Where every tensor lies, and keepkv's entry of the metadata. Raises ValueError unless they fill the file exactly."""
        size = os.fstat(self._descriptor).st_size
        if size < 8:
            raise ValueError("its header is cut off or too long")
        raw = bytearray(8)
        self._read(memoryview(raw), 0)
        length = int.from_bytes(raw, "little")
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise ValueError("its header is cut off or too long")
        raw = bytearray(length)
        self._read(memoryview(raw), 8)
        fields = schema.parse(bytes(raw))
        metadata = schema.mapping(fields.pop("__metadata__", {}))
        places = {name: _place(schema.mapping(each), 8 + length) for name, each in fields.items()}
        end = 8 + length
        for place in sorted(places.values(), key=lambda place: (place.start, place.size)):
            if place.start != end:
                raise ValueError("its tensors do not lie one behind the other")
            end += place.size
        if end != size:
            raise ValueError("its tensors do not fill it exactly")
        return places, metadata.get("keepkv")

    def _read(self, buffer: memoryview, start: int) -> None:
        """Fills a buffer with what stands in the file from a byte on. Raises OSError, and ValueError where the file ends."""
        while buffer:
            count = os.preadv(self._descriptor, [buffer[: 1 << 30]], start)
            if not count:
                raise ValueError("it was cut short while it was read")
            buffer, start = buffer[count:], start + count


def _place(fields: Mapping[str, Any], origin: int) -> _Place:
    """What a safetensors header says of a tensor. Raises ValueError."""
    if fields.keys() != {"dtype", "shape", "data_offsets"} or fields["dtype"] not in _DTYPES:
        raise ValueError("its header describes a tensor of an unknown kind")
    dtype = _DTYPES[schema.text(fields["dtype"])]
    shape = tuple(schema.whole(size) for size in schema.sequence(fields["shape"]))
    start, end = (schema.whole(offset) for offset in schema.sequence(fields["data_offsets"], 2))
    count = 1
    for size in shape:
        count *= size
    if len(shape) > 8 or end - start != count * dtype.itemsize:
        raise ValueError("its header describes a tensor of another size")
    return _Place(dtype, shape, origin + start, end - start)


def write(file: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a .keep file, whole or not at all, whenever the process or the machine stops. A new file is its owner's only.

    Args:
        file: Where to.
        header: Whatever is to be known of the tensors, as JSON can hold it.
        tensors: By name.

    Raises:
        InputError: if the file cannot be written, or a tensor holds what is no number.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        if not _is_sound(name, tensor):
            raise InputError(
                f"{name} holds what is no number (NaN or infinity), so that no file is written: read the text again"
            )
    signed = {**header, "format": FORMAT, "tensors": {name: _tensor_digest(tensor) for name, tensor in stored.items()}}
    signed["digest"] = _digest(signed)
    try:
        with atomic_file(file, private=True) as scratch:
            save_file({name: _alone(tensor) for name, tensor in stored.items()}, scratch, {"keepkv": json.dumps(signed)})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(file)!r} cannot be written ({reason})") from error


def _is_sound(name: str, tensor: Tensor) -> bool:
    """Whether all its numbers are finite. Votes may be none, whose logarithm is minus infinity."""
    if not tensor.is_floating_point():
        return True
    votes = name.endswith(".bias")
    return bool((tensor.isfinite() | tensor.isneginf() if votes else tensor.isfinite()).all())


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is part of a larger one: safetensors refuses tensors that share memory."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _digest(header: Mapping[str, Any]) -> str:
    return digest(json.dumps(header, sort_keys=True).encode())


def _tensor_digest(tensor: Tensor) -> str:
    total = hashlib.sha256(f"{list(tensor.shape)} {tensor.dtype} ".encode())
    if tensor.numel():
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
