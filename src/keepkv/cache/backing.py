"""Backing: the exact keys and values of what was compressed, outside the device, so that nothing is lost for good."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from keepkv.recipe import BackingKind


@dataclass(frozen=True)
class Backing:
    """A value, like all that travels: adding gives a new one, and what it shares with the old one is not copied.

    parts: keys and values [B, H, n, ...] of one stretch after the other; on "disk" they are mapped files without a name, which
    the system takes back with the last reference, also if the process is killed. repeat_peak, [H, n] each, is what a repetition
    of the text asked of them; there for all parts or for none.
    """

    kind: BackingKind
    parts: tuple[tuple[Tensor, Tensor], ...] = ()
    repeat_peak: tuple[Tensor, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(keys.shape[2] for keys, _ in self.parts)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for part in self.parts for x in part)

    def add(self, keys: Tensor, values: Tensor, repeat_peak: Tensor | None) -> Backing:
        if not keys.shape[2]:
            return self
        keep = _on_disk if self.kind == "disk" else _in_memory
        asked = () if repeat_peak is None else (*self.repeat_peak, _in_memory(repeat_peak))
        return Backing(self.kind, (*self.parts, (keep(keys), keep(values))), asked)

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
    with tempfile.NamedTemporaryFile(prefix="keepkv-", delete=False) as file:
        file.truncate(x.numel() * x.element_size())
    path = Path(file.name)
    try:
        mapped = torch.from_file(file.name, shared=True, size=x.numel(), dtype=x.dtype)
    finally:
        path.unlink()
    return mapped.view(x.shape).copy_(x)
