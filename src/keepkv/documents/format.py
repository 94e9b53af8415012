"""The .keep format: one safetensors file whose header says what the tensors are, and proves it.

The metadata of the safetensors header has one entry, "keepkv": JSON with `format`, what the cache knows of itself, a SHA-256 of
every tensor, and `digest`, a SHA-256 of that JSON without it. So a file is refused before any of it is used if a byte that
matters was changed, and no code can be in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from keepkv.documents.identity import digest
from keepkv.errors import InputError

FORMAT = 4  # 4: names of settings; 3: slots may be quantized; 2: text and question are cut apart; older ones are read
_ALIGNED = 64  # bytes
_MOST_HEADER = 32 << 20  # bytes; a header is some hundred kilobytes


class Contents:
    """A .keep file that was opened: its header, and its tensors, mapped into memory and checked when they are taken."""

    def __init__(self, file: Path) -> None:
        """Raises InputError for a file that is missing, damaged, altered, of a newer format, or no .keep file at all."""
        self.file = file
        try:
            with file.open("rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                size = raw.seek(0, os.SEEK_END)
            if not 2 <= length <= min(_MOST_HEADER, size - 8):
                raise self.broken("its header is cut off or too long")
            self._tensors: Any = safe_open(file, framework="pt", device="cpu")
            told = (self._tensors.metadata() or {})["keepkv"]
            header = json.loads(told)
            version = header["format"]
        except OSError as error:
            raise InputError(f"{str(file)!r} cannot be read ({error.strerror or error})") from error
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
        """One tensor, mapped, or copied where it does not lie as PyTorch's own do: matrix products round by that.

        Raises InputError if it is damaged, missing, or not of that shape (None: any) and dtype.
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
    """Writes a .keep file: whole or not at all, whenever the process or the machine stops. Raises InputError.

    A temporary file beside it is written, flushed to the disk (fsync) and renamed; then the folder is flushed.
    """
    parts = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    told = {**header, "format": FORMAT, "tensors": {name: _tensor_digest(part) for name, part in parts.items()}}
    told["digest"] = _digest(told)
    try:
        with _scratch(file) as scratch:
            # safetensors refuses tensors that share memory: those that are part of a larger one are copied
            own = {
                n: p if p.untyped_storage().nbytes() == p.numel() * p.element_size() else p.clone() for n, p in parts.items()
            }
            save_file(own, scratch, {"keepkv": json.dumps(told)})
            flush(scratch)
            scratch.replace(file)
            flush(file.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(file)!r} cannot be written ({reason})") from error


@contextlib.contextmanager
def _scratch(file: Path) -> Iterator[Path]:
    """A name for a temporary file beside `file`, gone afterwards if it still exists."""
    number, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
    os.close(number)
    scratch = Path(name)
    scratch.unlink()  # save_file makes it anew, with the rights that new files have
    try:
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Asks the system to have a file, or a folder's names, on the disk before going on."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _digest(header: Mapping[str, Any]) -> str:
    return digest(json.dumps(header, sort_keys=True).encode())


def _tensor_digest(tensor: Tensor) -> str:
    total = hashlib.sha256(f"{list(tensor.shape)} {tensor.dtype} ".encode())
    if tensor.numel():
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
