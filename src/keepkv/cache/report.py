"""Report: what a cache holds: tokens, slots, votes, errors, and bytes as they are really stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keepkv import render
from keepkv.merge.merged import Merged

if TYPE_CHECKING:
    from keepkv.cache.layer import KeepLayer


@dataclass(frozen=True)
class Head:
    """What a compression made of one KV head. Shares are between 0 and 1, and 0 for methods that hold no queries out.

    Attributes:
        slots: How many slots it has.
        error: The share of its output that is lost on held-out queries and, if the text was repeated, on the repetition's.
        mass_error: The rms error of its slots' attention mass on held-out queries.
        evict_error: What `error` would be if the same slots had been kept without votes and fitted values (eviction).
        fallbacks: How often it fell back to a simpler rule, see `Report`.
        max_vote: The largest number of tokens' attention mass that one slot stands for.
    """

    slots: int
    error: float
    mass_error: float
    evict_error: float
    fallbacks: int
    max_vote: float

    @staticmethod
    def of(merged: Merged, tail: int = 0) -> Head:
        """From what a merge returned; its newest `tail` entries are not slots: they stay exact, in the tail."""
        slots = len(merged.bias) - tail
        max_vote = float(merged.bias.max().exp()) if slots else 0.0
        return Head(slots, merged.error, merged.mass_error, merged.evict_error, merged.fallbacks, max_vote)


@dataclass(frozen=True, repr=False)
class Report:
    """What was kept of a text, and what the cache holds now. `print(report)` shows it, and a notebook draws it.

    Attributes:
        method: The method's name.
        budget: The budget in words.
        tokens: Tokens read per batch row, without padding, when the cache was last compressed.
        heads: What the compression made of each, `heads[row][layer][head]`; empty if nothing was compressed.
        slots_per_head: Slots per KV head, a mean over rows, layers and heads; 0 if nothing was compressed.
        tail: Tokens that are held exactly beside the slots.
        max_vote: The largest number of tokens' attention mass that one slot stands for.
        fallbacks: Heads where the fit lost to eviction on held-out queries, or keys where ZIP merging was near its pole.
        error: The share of a head's output that is lost on held-out queries, a mean over heads; 0 for methods that hold
            no queries out.
        kv_bytes: Bytes of the storages that hold slots and tail.
        kv_bytes_full: Bytes that an uncompressed cache of all tokens read would take, see `Recipe.full_dtype`.
        watch_bytes: Bytes of the queries remembered for the next compression; not part of kv_bytes.
        backing_bytes: Bytes of the exact keys and values kept outside the device; not part of kv_bytes.
        index_bytes: Bytes of the keys that the text is looked up by; not part of kv_bytes.
        compress_seconds: Of all compressions together.
        repeat_seconds: Of repeating the text before it was compressed.
        longest_pause: Seconds of the slowest compression.
        compressions: How many there were; a live cache is compressed again and again.
        note: Why nothing was compressed, if so.
        backend: What attends to the slots, and why not the device's fast backend, if so.
        slot_dtype: How the slots' keys and values are stored, see `SlotDtype`.
        layers: The model's layers that are compressed, those with full attention.

    Examples:
        >>> print(Report("keepkv", "10%", tokens=(1000,), kv_bytes=200_000, kv_bytes_full=2_000_000))
        method  keepkv
        budget  10%
        tokens  1,000
        bytes   200.0 kB instead of 2.0 MB
    """

    method: str
    budget: str
    tokens: tuple[int, ...]
    heads: tuple[tuple[tuple[Head, ...], ...], ...] = ()
    slots_per_head: float = field(init=False)
    tail: int = 0
    max_vote: float = field(init=False)
    fallbacks: int = field(init=False)
    error: float = field(init=False)
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    watch_bytes: int = 0
    backing_bytes: int = 0
    index_bytes: int = 0
    compress_seconds: float = 0.0
    repeat_seconds: float = 0.0
    longest_pause: float = 0.0
    compressions: int = 0
    note: str = ""
    backend: str = ""
    slot_dtype: str = "float"
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        heads = self._all_heads
        vars(self).update(
            slots_per_head=fmean(head.slots for head in heads) if heads else 0.0,
            max_vote=max((head.max_vote for head in heads), default=1.0),
            fallbacks=sum(head.fallbacks for head in heads),
            error=fmean(head.error for head in heads) if heads else 0.0,
        )

    @property
    def _all_heads(self) -> list[Head]:
        return [head for row in self.heads for layer in row for head in layer]

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
        """All fields as plain values, for JSON."""
        return asdict(self)

    def lines(self) -> dict[str, str]:
        """What there is to say, name by name: the lines of `print(report)`."""
        heads = self._all_heads
        fallen = sum(head.fallbacks > 0 for head in heads)
        several = f" in {self.compressions:,} compressions, at most {self.longest_pause:.1f} s each"
        smaller = f", {self.ratio:.1f} times smaller" if heads else ""
        lines = {
            "method": self.method,
            "budget": self.budget,
            "tokens": ", ".join(f"{count:,}" for count in self.tokens) or "none",
            "slots per head": self._slots_line() if heads else "",
            "tail": f"{self.tail:,} tokens held exactly" if heads and self.tail else "",
            "bytes": f"{render.size(self.kv_bytes)} instead of {render.size(self.kv_bytes_full)}{smaller}",
            "error": f"{self.error:.2%} of a head's output is lost on held-out queries" if self.error else "",
            "largest vote": f"{self.max_vote:,.1f} tokens" if heads else "",
            "fallbacks": f"{self.fallbacks:,}, in {fallen:,} of {len(heads):,} heads" if self.fallbacks else "",
            "repeating": f"{self.repeat_seconds:.1f} s" if self.repeat_seconds else "",
            "compressing": f"{self.compress_seconds:.1f} s{several if self.compressions > 1 else ''}",
            "queries": f"{render.size(self.watch_bytes)} for the next compression" if self.watch_bytes else "",
            "backing": f"{render.size(self.backing_bytes)} of exact keys and values outside the device",
            "index": f"{render.size(self.index_bytes)} to look back by" if self.index_bytes else "",
            "backend": self.backend,
            "note": self.note,
        }
        unused = {"bytes": not self.kv_bytes, "compressing": not self.compressions, "backing": not self.backing_bytes}
        return {name: line for name, line in lines.items() if line and not unused.get(name)}

    def _slots_line(self) -> str:
        counts = [head.slots for head in self._all_heads]
        spread = f" ({min(counts):,} to {max(counts):,})" if min(counts) < max(counts) else ""
        stored = "" if self.slot_dtype == "float" else f", stored as {self.slot_dtype}"
        return f"{self.slots_per_head:,.1f}".removesuffix(".0") + spread + stored

    def __str__(self) -> str:
        return render.text_table(self.lines())

    def __repr__(self) -> str:
        fields = ("method", "budget", "tokens", "slots_per_head", "tail", "kv_bytes", "kv_bytes_full", "slot_dtype", "note")
        shown = ((name, getattr(self, name)) for name in fields)
        return f"Report({', '.join(f'{name}={value!r}' for name, value in shown if value != '')})"

    def _repr_html_(self) -> str:
        """For notebooks: the lines as a table, and the first row's slots per layer and head as a figure."""
        return render.html_table(self.lines(), self.figure())

    def figure(self) -> str:
        """The first row's slots per layer and head as an SVG image; nothing if nothing was compressed."""
        return render.slots_figure(self.kept[0], self.layers or None) if self.heads else ""


def with_bytes_held(
    report: Report, layers: Sequence[KeepLayer], others: Sequence[Tensor], full_dtype: torch.dtype | None = None
) -> Report:
    """The report with what the layers, and the tensors of other layers, hold at this moment. full_dtype: see `Policy`."""
    ours = [x for layer in layers for x in (layer.keys, layer.values, *(layer.slots.tensors if layer.slots else ()))]
    token_bytes = sum(layer.price(full_dtype=full_dtype).token * layer.heads for layer in layers) * len(layers[0].keys)
    return replace(
        report,
        tail=layers[0].tail,
        backend=", ".join(dict.fromkeys(str(layer.backend) for layer in layers if layer.slots)),
        kv_bytes=held_bytes([*ours, *others]),
        kv_bytes_full=layers[0].seen * token_bytes + held_bytes(others),
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
