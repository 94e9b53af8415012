"""Backing: the exact keys and values of what was compressed, kept outside the device, so that nothing is lost for good."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from keepkv.errors import KeepKVError
from keepkv.recipe import BackingKind


@dataclass(frozen=True)
class Backing:
    """One layer's exact keys and values. Adding to it gives a new one, which shares the older tensors.

    Attributes:
        kind: "cpu", in memory, or "disk". On disk they are mapped files without a name: the system frees them with the last
            reference, also if the process is killed.
        parts: Keys and values [B, H, n, ...] of one stretch of tokens after the other.
        repeat_peak: [H, n] for every part, the largest share of attention that a repetition of the text paid each token; there
            for all parts or for none.
    """

    kind: BackingKind
    parts: tuple[tuple[Tensor, Tensor], ...] = ()
    repeat_peak: tuple[Tensor, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens it holds."""
        return sum(keys.shape[2] for keys, _ in self.parts)

    @property
    def bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.numel() * x.element_size() for part in self.parts for x in part)

    def add(self, keys: Tensor, values: Tensor, repeat_peak: Tensor | None) -> Backing:
        """With the next stretch of tokens: keys and values [B, H, n, ...], repeat_peak [H, n]."""
        if not keys.shape[2]:
            return self
        keep = _on_disk if self.kind == "disk" else _in_memory
        peaks = () if repeat_peak is None else (*self.repeat_peak, _in_memory(repeat_peak))
        return Backing(self.kind, (*self.parts, (keep(keys), keep(values))), peaks)

    def row(self, row: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Everything of one batch row and then keys, values [B, H, n, ...] of the tail: [H, T, ...] on the tail's device."""
        older = zip(*self.parts, strict=True) if self.parts else ((), ())
        together = [
            torch.cat([*(part[row].to(tail.device) for part in parts), tail[row]], dim=1)
            for parts, tail in zip(older, (keys, values), strict=True)
        ]
        return together[0], together[1]


def _in_memory(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True)


def _on_disk(x: Tensor) -> Tensor:
    """Written first and mapped then: in a mapped file that the disk has no room for, writing would end the process."""
    exact = x.detach().cpu().contiguous()
    path = None
    try:
        with tempfile.NamedTemporaryFile(prefix="keepkv-", delete=False) as file:
            path = Path(file.name)
            file.write(exact.view(-1).view(torch.uint8).numpy().data)
        mapped = torch.from_file(file.name, shared=True, size=x.numel(), dtype=x.dtype)
    except OSError as error:
        raise KeepKVError(
            f"the exact keys and values cannot be kept on disk ({error.strerror or error}): let TMPDIR name a folder with "
            "room, or take backing='cpu'"
        ) from error
    finally:
        if path is not None:
            path.unlink()
    return mapped.view(x.shape)
