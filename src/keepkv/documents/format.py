"""The .keep format: one safetensors file whose header says what the tensors are, and proves it.

The metadata of the safetensors header has one entry, "keepkv": JSON with `format` (a number), what the cache knows of itself,
a SHA-256 of every tensor, and `digest`, a SHA-256 of that JSON without it. So a file is refused before any of it is used if a
byte that matters was changed, and no code can be in it. Which tensors there are is said in packing.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from keepkv.errors import InputError
from keepkv.models.identity import digest
from keepkv.paths import atomic_file

# Older ones are read too. New in 5: keys by channel; in 4: names of settings; in 3: quantized slots; in 2: a question's frame
FORMAT = 5
_ALIGNED = 64  # bytes
_LARGEST_HEADER = 32 << 20  # bytes; a header is some hundred kilobytes


class Contents:
    """An open .keep file: its header, and its tensors, which are mapped into memory and checked when they are taken.

    Attributes:
        file: The file.
        header: What the file says of its cache, checked against its digest.

    Raises:
        InputError: for a file that is missing, damaged, altered, of a newer format, or no .keep file at all.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with file.open("rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                size = raw.seek(0, os.SEEK_END)
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise self.broken("its header is cut off or too long")
            self._tensors: Any = safe_open(file, framework="pt", device="cpu")
            header = json.loads((self._tensors.metadata() or {})["keepkv"])
            version = header["format"]
        except OSError as error:
            raise InputError(
                f"{str(file)!r} cannot be read ({error.strerror or error}): expected a file made by keepkv compile"
            ) from error
        except SafetensorError as error:
            raise self.broken(str(error)) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.broken("its header says nothing about a cache") from error
        if not isinstance(version, int) or version < 1:
            raise self.broken("its format has no number")
        if version > FORMAT:
            raise InputError(
                f"{str(file)!r} was written by a newer keepkv (format {version}, this one reads {FORMAT}): update keepkv"
            )
        expected = header.pop("digest", None)
        if expected != _digest(header) or set(self._tensors.keys()) != set(header["tensors"]):
            raise self.broken("its header was altered")
        self.header: Mapping[str, Any] = header

    def __contains__(self, name: str) -> bool:
        return name in self.header["tensors"]

    def take(self, name: str, *shape: int | None, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, mapped; or copied if it is not aligned as PyTorch's own are, since matrix products round by that.

        Args:
            name: The tensor's name.
            shape: What every dimension must be; None is any size.
            dtype: What its dtype must be; None is any.

        Raises:
            InputError: if it is damaged, missing, or of another shape or dtype.
        """
        if name not in self:
            raise self.broken(f"it has no {name}")
        try:
            tensor: Tensor = self._tensors.get_tensor(name)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise self.broken(str(error)) from error
        if _tensor_digest(tensor) != self.header["tensors"][name]:
            raise self.broken(f"{name} was altered")
        fits = len(shape) == tensor.dim() and all(a is None or a == b for a, b in zip(shape, tensor.shape, strict=True))
        if not fits or (dtype is not None and tensor.dtype != dtype):
            raise self.broken(f"{name} is {list(tensor.shape)} {tensor.dtype}, which is not what belongs there")
        return tensor if tensor.data_ptr() % _ALIGNED == 0 else tensor.clone()

    def broken(self, why: str) -> InputError:
        """The error for a file that is not what it should be."""
        return InputError(f"{str(self.file)!r} is not a whole .keep file: {why.splitlines()[0]}")


def write(file: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a .keep file, whole or not at all, whenever the process or the machine stops.

    Args:
        file: Where to.
        header: Whatever is to be known of the tensors, as JSON can hold it.
        tensors: By name.

    Raises:
        InputError: if the file cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    signed = {**header, "format": FORMAT, "tensors": {name: _tensor_digest(tensor) for name, tensor in stored.items()}}
    signed["digest"] = _digest(signed)
    try:
        with atomic_file(file) as scratch:
            save_file({name: _alone(tensor) for name, tensor in stored.items()}, scratch, {"keepkv": json.dumps(signed)})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(file)!r} cannot be written ({reason})") from error


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
