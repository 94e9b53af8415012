"""Observe: what a layer's attention shows while tokens are read, in bounded memory.

A `Watch` is a value: seeing more tokens gives a new one. Per batch row it holds a bank of queries: the newest ones and
a sample of the others. The sample is the same however the text is cut into chunks and whatever the batch around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from keepkv.errors import InputError, KeepKVError
from keepkv.observe.bank import Bank
from keepkv.slots.slots import Slots
from keepkv.types import Observation

PENDING = 256  # queries that wait to be banked: one by one would cost a copy of the bank each
_TILE = 1 << 24  # logits held at once


class LayerState(NamedTuple):
    """What a layer holds: slots, or None, and the tail keys, values [B, H, n, ...]: the newest of `seen` columns."""

    slots: Slots | None
    keys: Tensor
    values: Tensor
    seen: int

    @property
    def width(self) -> int:
        """Entries of a row without padding, the longest head's slots and the tail."""
        return self.keys.shape[2] + (max(self.slots.counts, default=0) if self.slots else 0)

    def first(self, start: int) -> int:
        """The first column of the tail that is a token of a row that starts at column `start`."""
        return max(start, self.seen - self.keys.shape[2])

    def entries(self, row: int, start: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Keys [H, T, d], values, bias, places [H, T] of one row's slots and tail together: see `Observation`."""
        heads, size = self.keys.shape[1:3]
        first = self.first(start)
        keys, values = (x[row, :, first - self.seen + size :] for x in (self.keys, self.values))
        if self.slots is None:
            return keys, values, None, None
        older = self.slots.rows([row], heads).padded()
        places = torch.arange(first - start, self.seen - start, device=keys.device).expand(heads, -1)
        newer = (keys, values, torch.zeros(places.shape, device=keys.device), places)
        keys, values, bias, places = (torch.cat(pair, dim=1) for pair in zip(older, newer, strict=True))
        return keys, values, bias, places


@dataclass(frozen=True)
class Watch:
    """What one layer has shown so far: at most `limit` queries per row, beside `old` ones from before the last compression;
    starts, each row's first real token. rounded: queries are kept in bfloat16, as good for references and half the memory.

    pending [B, H, G, n, d] are the newest queries, of `waiting` tokens, not in the banks yet. column_mass, per row, and
    repeat_peak, for one row, [H, T'], are of the first T' entries of what the layer holds. repeated: at most `limit` queries of
    a repetition of the text, for one row.
    """

    layer: int
    limit: int
    seed: int
    with_column_mass: bool
    scale: float
    rounded: bool = False
    banks: tuple[Bank, ...] = ()
    starts: tuple[int, ...] = ()
    pending: tuple[Tensor, ...] = ()
    waiting: int = 0
    old: int = 0
    column_mass: tuple[Tensor, ...] | None = None
    repeat_peak: Tensor | None = None
    repeated: Bank | None = None

    @property
    def tensors(self) -> list[Tensor]:
        every = (*self.banks, self.repeated) if self.repeated else self.banks
        banks = [x for bank in every for x in (bank.queries, bank.positions)]
        return [*banks, *self.pending, *(self.column_mass or ()), *([] if self.repeat_peak is None else [self.repeat_peak])]

    def see(self, queries: Tensor, held: LayerState, mask: Tensor | None) -> Watch:
        """After a forward pass: queries [B, H, G, new, d], what the layer holds now, a mask for the newest columns."""
        batch, new = len(queries), queries.shape[3]
        starts = self.starts
        if not starts or (mask is not None and (new > 1 or max(starts) >= held.seen - new)):
            starts = _starts(mask, batch, held.seen, starts, held.seen - new)
        if self.rounded and queries.element_size() > 2:
            queries = queries.bfloat16()
        watch = replace(self, starts=starts, pending=(*self.pending, queries), waiting=self.waiting + new)
        return watch.banked(held) if watch.waiting >= PENDING else watch

    def banked(self, held: LayerState) -> Watch:
        """The pending queries moved into the banks, and, if wanted, their attention summed."""
        if not self.pending:
            return self
        pending = torch.cat(self.pending, dim=3)
        new = pending.shape[3]
        empty = Bank(pending[0, :, :, :0], torch.empty(0, dtype=torch.int64, device=pending.device))
        banks, masses = [], []
        for row, start in enumerate(self.starts):
            first = max(start, held.seen - new)  # the first real token among the new ones
            fresh = pending[row, :, :, first - held.seen + new :]
            positions = torch.arange(first - start, held.seen - start, device=pending.device)
            banks.append((self.banks[row] if self.banks else empty).add(fresh, positions, self.limit + self.old, self.seed))
            if self.with_column_mass:
                keys, _, bias, places = held.entries(row, start)
                mass = _column_mass(fresh, positions, keys, bias, places, self.scale)
                masses.append(mass if self.column_mass is None else mass + _grown(self.column_mass[row], mass.shape[1]))
        return replace(self, banks=tuple(banks), pending=(), waiting=0, column_mass=tuple(masses) if masses else None)

    def repeat(self, peak: Tensor, held: LayerState) -> Watch:
        """After a piece of the text was repeated: peak [H, n], the largest share each token of the tail got."""
        peak = pad(peak, (held.width - peak.shape[1], 0))
        return replace(
            self, repeat_peak=peak if self.repeat_peak is None else torch.maximum(_grown(self.repeat_peak, held.width), peak)
        )

    def keep_repeated(self, queries: Tensor, positions: Tensor) -> Watch:
        """After a piece of the text, tokens `positions` [n], was repeated: queries [H, G, n, d] as they were asked."""
        before = self.repeated or Bank(queries[:, :, :0], positions[:0])
        return replace(self, repeated=before.add(queries, positions, self.limit, self.seed))

    def observation(self, row: int, held: LayerState, inv_freq: Tensor) -> Observation:
        """The Observation of one batch row."""
        watch = self.banked(held)
        start, bank = watch.starts[row], watch.banks[row]
        keys, values, bias, places = held.entries(row, start)
        mass = None if watch.column_mass is None else _grown(watch.column_mass[row], keys.shape[1])
        repeat_peak = None if watch.repeat_peak is None else _grown(watch.repeat_peak, keys.shape[1])
        return Observation(
            keys, values, bank.queries, bank.positions, inv_freq, self.scale, self.layer, self.seed, mass, repeat_peak,
            None if watch.repeated is None else watch.repeated.queries, bias=bias, places=places, read=held.seen - start,
        )  # fmt: skip

    def compacted(self, kept: Sequence[Sequence[Tensor]], held: LayerState) -> Watch:
        """After a compression of what was held, kept [row][head] its entries that stay. Half of the queries are remembered."""
        watch = self.banked(held)
        banks = tuple(bank.add(bank.queries[:, :, :0], bank.positions[:0], self.limit // 2, self.seed) for bank in watch.banks)
        mass = watch.column_mass and tuple(_kept(x, heads) for x, heads in zip(watch.column_mass, kept, strict=True))
        repeat_peak = watch.repeat_peak
        if repeat_peak is not None:
            repeat_peak = _kept(_grown(repeat_peak, 1 + max(int(head[-1]) if len(head) else 0 for head in kept[0])), kept[0])
        old = max(len(bank.positions) for bank in banks)
        return replace(watch, banks=banks, old=old, column_mass=mass, repeat_peak=repeat_peak)

    def cropped(self, held: LayerState, count: int) -> Watch:
        """Without the newest `count` columns of what is held. Raises KeepKVError where their attention is summed already."""
        pending, left = list(self.pending), count
        while left and pending:
            last = pending.pop()
            if last.shape[3] > left:
                pending.append(last[:, :, :, : last.shape[3] - left])
            left -= min(left, last.shape[3])
        if left and self.with_column_mass:
            raise KeepKVError(
                f"crop(-{count}): attention is summed while reading, and what {left} of these tokens gave cannot be undone"
            )
        end = held.seen - count
        banks = self.banks
        if left:
            banks = tuple(bank.before(end - start) for bank, start in zip(banks, self.starts, strict=True))
        repeat_peak = None if self.repeat_peak is None else self.repeat_peak[:, : held.width - count]
        return replace(self, pending=tuple(pending), waiting=max(0, self.waiting - count), banks=banks, repeat_peak=repeat_peak)

    def rows(self, indices: Tensor) -> Watch:
        """The given batch rows, in that order."""
        take = indices.tolist()
        mass = self.column_mass and tuple(self.column_mass[row] for row in take)
        banks = tuple(self.banks[row] for row in take) if self.banks else ()
        pending = tuple(part[indices] for part in self.pending)
        return replace(self, banks=banks, starts=tuple(self.starts[row] for row in take), pending=pending, column_mass=mass)


def _grown(x: Tensor, entries: int) -> Tensor:
    """x [H, n] with zeros for the entries that came later."""
    return pad(x, (0, max(0, entries - x.shape[1])))


def _kept(x: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """x [H, T] of the entries that stay, the shorter heads filled up in front, as in `Slots.padded`."""
    most = max(map(len, kept), default=0)
    return torch.stack([pad(head[stay], (most - len(stay), 0)) for head, stay in zip(x, kept, strict=True)])


def _starts(mask: Tensor | None, batch: int, seen: int, known: tuple[int, ...], before: int) -> tuple[int, ...]:
    """The first visible column of every row of a mask [B or 1, 1, q, n] for the newest n of `seen` columns.

    known: the same from before, settled where a row had tokens among the first `before` columns. Raises InputError where
    anything but the padding in front is hidden.
    """
    if mask is None:
        return (0,) * batch
    last = mask[:, 0, -1]
    visible = last if mask.dtype == torch.bool else last > torch.finfo(mask.dtype).min / 2
    offset = seen - visible.shape[-1]
    found = (offset + visible.shape[-1] - visible.sum(-1)).expand(batch).tolist()
    settled = [i for i, start in enumerate(known) if start < before]
    if visible.cummax(-1).values.ne(visible).any() or any(found[i] != max(known[i], offset) for i in settled):
        raise InputError("KeepCache reads left-padded batches; the attention mask hides tokens after the first visible one")
    return tuple(known[i] if i in settled else start for i, start in enumerate(found))


def _column_mass(
    queries: Tensor, asked: Tensor, keys: Tensor, bias: Tensor | None, places: Tensor | None, scale: float
) -> Tensor:
    """Attention of queries [H, G, n, d], asked at positions [n], summed per entry [H, T], mean over the group; in tiles."""
    heads, group, new, _ = queries.shape
    entries = keys.shape[1]
    if places is None:
        places = torch.arange(entries, device=keys.device).expand(heads, -1)
    total = torch.zeros(heads, entries, device=keys.device)
    step = max(1, _TILE // (heads * group * max(1, entries)))
    wide = keys.float()[:, None]
    for lo in range(0, new, step):
        logits = (queries[:, :, lo : lo + step].float() * scale) @ wide.transpose(-1, -2)
        if bias is not None:
            logits += bias[:, None, None]
        logits.masked_fill_((places[:, None] > asked[lo : lo + step, None])[:, None], -torch.inf)
        total += logits.softmax(-1).nan_to_num_().sum(2).mean(1)
    return total
