"""What a cache holds: tokens, slots, votes, and bytes as they are really stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import Tensor

from keepkv.merge.merged import Merged
from keepkv.slots.slots import BESIDE

if TYPE_CHECKING:
    from keepkv.cache.layer import KeepLayer


@dataclass(frozen=True)
class Head:
    """One compressed KV head.

    error: the share of its output that is lost on held-out queries and, if the text was repeated, on recall queries;
    mass_error: the rms error of its slots' mass on held-out queries; evict_error: error, had it been evicted; all 0 where
    nothing is held out. max_vote: the largest number of tokens' mass that one slot stands for. fallbacks: see `Report`.
    """

    slots: int
    error: float
    mass_error: float
    evict_error: float
    fallbacks: int
    max_vote: float

    @staticmethod
    def of(merged: Merged, exact: int = 0) -> Head:
        """exact: how many of the newest entries are not slots but stay in the tail."""
        slots = len(merged.bias) - exact
        vote = float(merged.bias.max().exp()) if slots else 0.0
        return Head(slots, merged.error, merged.mass_error, merged.evict_error, merged.fallbacks, vote)


@dataclass(frozen=True)
class Report:
    """What was kept of the prompt, and what the cache holds now.

    tokens: read per batch row, without padding, when it was last compressed. heads[row][layer][head]: what the compression
    made of each; empty if nothing was compressed. slots: their mean. tail: tokens that are held exactly beside the slots.
    max_vote: the largest number of tokens' mass that one slot stands for. kv_bytes: bytes of the storages held;
    kv_bytes_full: of a cache of all tokens seen.
    watch_bytes: of the queries remembered for the next compression; backing_bytes: of the exact history outside the device;
    neither is part of kv_bytes. compress_seconds: of all `compressions` together; longest_pause: of the slowest;
    repeat_seconds: of repeating the text.
    fallbacks: heads where the fit lost to eviction on held-out queries, or keys where ZIP was near its pole. error:
    the mean over heads of the output error on held-out queries (a share), 0 for methods that hold nothing out.
    note: why nothing was compressed, if so. backend: what attends to the slots, and why not the device's fast backend, if so.
    slot_dtype: how the slots' keys and values are stored, "float", "int8" or "int4".
    """

    method: str
    budget: str
    tokens: tuple[int, ...]
    heads: tuple[tuple[tuple[Head, ...], ...], ...] = field(default=(), repr=False)
    slots: float = field(init=False)
    tail: int = 0
    max_vote: float = field(init=False)
    fallbacks: int = field(init=False)
    error: float = field(init=False)
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    watch_bytes: int = 0
    backing_bytes: int = 0
    compress_seconds: float = 0.0
    repeat_seconds: float = 0.0
    longest_pause: float = 0.0
    compressions: int = 0
    note: str = ""
    backend: str = ""
    slot_dtype: str = "float"

    def __post_init__(self) -> None:
        heads = [head for row in self.heads for layer in row for head in layer]
        vars(self).update(
            slots=fmean(head.slots for head in heads) if heads else 0.0,
            max_vote=max((head.max_vote for head in heads), default=1.0),
            fallbacks=sum(head.fallbacks for head in heads),
            error=fmean(head.error for head in heads) if heads else 0.0,
        )

    @property
    def kept(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Slots per row, layer and head; empty if nothing was compressed."""
        return tuple(tuple(tuple(head.slots for head in layer) for layer in row) for row in self.heads)

    def rows(self, which: Sequence[int]) -> Report:
        """The report of the given rows, in that order."""
        heads = tuple(self.heads[row] for row in which) if self.heads else ()
        return replace(self, tokens=tuple(self.tokens[row] for row in which), heads=heads)

    @property
    def ratio(self) -> float:
        """How many times smaller than the full cache."""
        return self.kv_bytes_full / max(1, self.kv_bytes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def weighed(report: Report, layers: Sequence[KeepLayer], others: Sequence[Tensor]) -> Report:
    """The report with what the layers, and the tensors of other layers, hold at this moment."""
    ours = [x for layer in layers for x in (layer.keys, layer.values, *(layer.slots.tensors if layer.slots else ()))]
    width = sum((layer.slot_bytes() - BESIDE) * layer.heads for layer in layers) * len(layers[0].keys)
    return replace(
        report,
        tail=layers[0].tail,
        backend=", ".join(dict.fromkeys(str(layer.backend) for layer in layers if layer.slots)),
        kv_bytes=held_bytes([*ours, *others]),
        kv_bytes_full=layers[0].seen * width + held_bytes(others),
        watch_bytes=held_bytes(x for layer in layers if layer.watch for x in layer.watch.tensors),
        backing_bytes=sum(layer.backing.bytes for layer in layers if layer.backing),
    )


def held_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct storages behind the tensors: what is really held, views counted with all they keep alive."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr(), storage.device] = storage.nbytes()
    return sum(storages.values())
