"""Watch: what a layer's attention shows while tokens are read, in bounded memory.

A `Watch` is a value: seeing more tokens gives a new one. For each row of the batch it holds a bank of queries, the newest ones
and a sample of the others. The sample is the same however the text is cut into chunks and whatever the batch around it.
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
from keepkv.ops.rope import Rotation
from keepkv.ops.softmax import PLAIN, Softmax, shares
from keepkv.slots.slots import Slots
from keepkv.types import Observation

PENDING = 256  # queries that wait to be banked: one by one would cost a copy of the bank each
_TILE = 1 << 24  # logits computed at once


class LayerState(NamedTuple):
    """What a layer holds.

    Attributes:
        slots: Its compact part, or None.
        keys: [B, H, n, d], the exact keys of its tail, the newest columns.
        values: [B, H, n, d_v].
        seen: How many columns it has read, padding included.
    """

    slots: Slots | None
    keys: Tensor
    values: Tensor
    seen: int

    @property
    def width(self) -> int:
        """Entries of a row without padding: the longest head's slots and the tail."""
        return self.keys.shape[2] + (max(self.slots.counts, default=0) if self.slots else 0)

    def first(self, start: int) -> int:
        """The first column of the tail that is a token of a row that starts at column `start`."""
        return max(start, self.seen - self.keys.shape[2])

    def entries(self, row: int, start: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Keys, values, bias and positions of one row's slots and tail together, as `Observation` has them."""
        heads, size = self.keys.shape[1:3]
        first = self.first(start)
        keys, values = (x[row, :, first - self.seen + size :] for x in (self.keys, self.values))
        if self.slots is None:
            return keys, values, None, None
        older = self.slots.rows([row], heads).padded()
        positions = torch.arange(first - start, self.seen - start, device=keys.device).expand(heads, -1)
        newer = (keys, values, torch.zeros(positions.shape, device=keys.device), positions)
        keys, values, bias, positions = (torch.cat(pair, dim=1) for pair in zip(older, newer, strict=True))
        return keys, values, bias, positions


@dataclass(frozen=True)
class Watch:
    """What one layer has shown so far.

    Args:
        layer: The layer's index.
        limit: At most so many queries of a row are in its bank, beside `old` ones.
        seed: Of the sample.
        with_column_mass: Whether the attention of all queries is summed.
        scale: The factor on q·k.
        rounded: Whether queries are kept in bfloat16, which is as good for references and takes half the memory.
        banks: One for each row.
        starts: Each row's first real token.
        pending: The newest queries, each [B, H, G, n, d], which are not in the banks yet.
        waiting: Of how many tokens these are.
        old: How many queries a bank may have beside: those from before the last compression.
        column_mass: For each row [H, T'], the attention received by the first T' entries of what the layer holds; or None.
        repeat_peak: [H, T'], of one row, the largest share that each of these got during the repetition; or None.
        repeated: At most `limit` queries of a repetition of the text, of one row; or None.
        softmax: The layer's cap and sinks.
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
    softmax: Softmax = PLAIN

    @property
    def tensors(self) -> list[Tensor]:
        """All that is held, to count its bytes."""
        every = (*self.banks, self.repeated) if self.repeated else self.banks
        banks = [x for bank in every for x in (bank.queries, bank.positions)]
        return [*banks, *self.pending, *(self.column_mass or ()), *([] if self.repeat_peak is None else [self.repeat_peak])]

    def see(self, queries: Tensor, state: LayerState, mask: Tensor | None) -> Watch:
        """After a forward pass.

        Args:
            queries: [B, H, G, new, d], of the newest tokens.
            state: What the layer holds now, these tokens included.
            mask: The attention mask, [B or 1, 1, q, n], for the newest n columns; or None.

        Raises:
            InputError: if the mask hides anything but padding on the left.
        """
        batch, new = len(queries), queries.shape[3]
        before = state.seen - new
        starts = self.starts
        if not starts or (mask is not None and (new > 1 or max(starts) >= before)):
            starts = _starts(mask, batch, state.seen, starts, before)
        if self.rounded and queries.element_size() > 2:
            queries = queries.bfloat16()
        watch = replace(self, starts=starts, pending=(*self.pending, queries), waiting=self.waiting + new)
        return watch.banked(state) if watch.waiting >= PENDING else watch

    def banked(self, state: LayerState) -> Watch:
        """With the pending queries moved into the banks and, if wanted, their attention summed."""
        if not self.pending:
            return self
        pending = torch.cat(self.pending, dim=3)
        new = pending.shape[3]
        empty = Bank(pending[0, :, :, :0], torch.empty(0, dtype=torch.int64, device=pending.device))
        banks, masses = [], []
        for row, start in enumerate(self.starts):
            first = max(start, state.seen - new)  # the first real token among the new ones
            queries = pending[row, :, :, first - state.seen + new :]
            query_positions = torch.arange(first - start, state.seen - start, device=pending.device)
            bank = self.banks[row] if self.banks else empty
            banks.append(bank.add(queries, query_positions, self.limit + self.old, self.seed))
            if self.with_column_mass:
                keys, _, bias, positions = state.entries(row, start)
                mass = _column_mass(queries, query_positions, keys, bias, positions, self.scale, self.softmax)
                masses.append(mass if self.column_mass is None else mass + _grown(self.column_mass[row], mass.shape[1]))
        return replace(self, banks=tuple(banks), pending=(), waiting=0, column_mass=tuple(masses) if masses else None)

    def repeat(self, peak: Tensor, state: LayerState) -> Watch:
        """After a piece of the text was repeated: peak [H, n] is the largest share that each token of the tail got."""
        peak = pad(peak, (state.width - peak.shape[1], 0))
        if self.repeat_peak is not None:
            peak = torch.maximum(_grown(self.repeat_peak, state.width), peak)
        return replace(self, repeat_peak=peak)

    def keep_repeated(self, queries: Tensor, positions: Tensor) -> Watch:
        """After tokens `positions` [n] of the text were repeated: with queries [H, G, n, d] as they were asked."""
        before = self.repeated or Bank(queries[:, :, :0], positions[:0])
        return replace(self, repeated=before.add(queries, positions, self.limit, self.seed))

    def observation(self, row: int, state: LayerState, rotation: Rotation) -> Observation:
        """The Observation of one row of the batch."""
        watch = self.banked(state)
        start, bank = watch.starts[row], watch.banks[row]
        keys, values, bias, positions = state.entries(row, start)
        return Observation(
            keys=keys,
            values=values,
            queries=bank.queries,
            query_positions=bank.positions,
            rotation=rotation,
            scale=self.scale,
            layer=self.layer,
            seed=self.seed,
            column_mass=None if watch.column_mass is None else _grown(watch.column_mass[row], keys.shape[1]),
            repeat_peak=None if watch.repeat_peak is None else _grown(watch.repeat_peak, keys.shape[1]),
            repeated=None if watch.repeated is None else watch.repeated.queries,
            bias=bias,
            key_positions=positions,
            read=state.seen - start,
            softmax=self.softmax,
        )

    def compacted(self, kept: Sequence[Sequence[Tensor]], state: LayerState) -> Watch:
        """After a compression of `state`, of which the entries `kept[row][head]` stay. Half of the queries are remembered."""
        watch = self.banked(state)
        banks = tuple(bank.add(bank.queries[:, :, :0], bank.positions[:0], self.limit // 2, self.seed) for bank in watch.banks)
        mass = watch.column_mass and tuple(_kept(x, heads) for x, heads in zip(watch.column_mass, kept, strict=True))
        repeat_peak = watch.repeat_peak
        if repeat_peak is not None:
            last = max(int(head[-1]) if len(head) else 0 for head in kept[0])
            repeat_peak = _kept(_grown(repeat_peak, 1 + last), kept[0])
        old = max(len(bank.positions) for bank in banks)
        return replace(watch, banks=banks, old=old, column_mass=mass, repeat_peak=repeat_peak)

    def cropped(self, state: LayerState, count: int) -> Watch:
        """Without the newest `count` columns of `state`. Raises KeepKVError where their attention is summed already."""
        pending = list(self.pending)
        left = count
        while left and pending:
            last = pending.pop()
            if last.shape[3] > left:
                pending.append(last[:, :, :, : last.shape[3] - left])
            left -= min(left, last.shape[3])
        if left and self.with_column_mass:
            raise KeepKVError(
                f"crop(-{count}): attention is summed while reading, and what {left} of these tokens gave cannot be undone"
            )
        banks = self.banks
        if left:
            end = state.seen - count
            banks = tuple(bank.before(end - start) for bank, start in zip(banks, self.starts, strict=True))
        repeat_peak = None if self.repeat_peak is None else self.repeat_peak[:, : state.width - count]
        return replace(self, pending=tuple(pending), waiting=max(0, self.waiting - count), banks=banks, repeat_peak=repeat_peak)

    def rows(self, indices: Tensor) -> Watch:
        """The given rows of the batch, in that order."""
        take = indices.tolist()
        mass = self.column_mass and tuple(self.column_mass[row] for row in take)
        banks = tuple(self.banks[row] for row in take) if self.banks else ()
        pending = tuple(queries[indices] for queries in self.pending)
        return replace(self, banks=banks, starts=tuple(self.starts[row] for row in take), pending=pending, column_mass=mass)


def _grown(x: Tensor, entries: int) -> Tensor:
    """x [H, n] with zeros for the entries that came later."""
    return pad(x, (0, max(0, entries - x.shape[1])))


def _kept(x: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """x [H, T] of the entries that stay, the shorter heads filled up in front, as in `Slots.padded`."""
    most = max(map(len, kept), default=0)
    return torch.stack([pad(head[stay], (most - len(stay), 0)) for head, stay in zip(x, kept, strict=True)])


def _starts(mask: Tensor | None, batch: int, seen: int, settled: tuple[int, ...], before: int) -> tuple[int, ...]:
    """The first visible column of every row, from a mask [B or 1, 1, q, n] for the newest n of `seen` columns.

    settled: the same from before; it holds for rows that had tokens among the first `before` columns. Raises InputError where
    anything but the padding in front is hidden.
    """
    if mask is None:
        return (0,) * batch
    newest = mask[:, 0, -1]
    visible = newest if mask.dtype == torch.bool else newest > torch.finfo(mask.dtype).min / 2
    offset = seen - visible.shape[-1]
    starts = (offset + visible.shape[-1] - visible.sum(-1)).expand(batch).tolist()
    old_rows = [row for row, start in enumerate(settled) if start < before]
    has_gap = visible.cummax(-1).values.ne(visible).any()
    if has_gap or any(starts[row] != max(settled[row], offset) for row in old_rows):
        raise InputError("KeepCache reads left-padded batches; the attention mask hides tokens after the first visible one")
    return tuple(settled[row] if row in old_rows else start for row, start in enumerate(starts))


def _column_mass(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    scale: float,
    softmax: Softmax,
) -> Tensor:
    """Attention of queries [H, G, n, d], asked at positions [n], summed per entry [H, T], mean over the group; in tiles."""
    heads, group, new, _ = queries.shape
    entries = keys.shape[1]
    if positions is None:
        positions = torch.arange(entries, device=keys.device).expand(heads, -1)
    total = torch.zeros(heads, entries, device=keys.device)
    step = max(1, _TILE // (heads * group * max(1, entries)))
    wide = keys.float()[:, None]
    sinks = softmax.of_groups(heads)
    sinks = None if sinks is None else sinks[..., None]
    for lo in range(0, new, step):
        logits = softmax.capped((queries[:, :, lo : lo + step].float() * scale) @ wide.transpose(-1, -2))
        if bias is not None:
            logits += bias[:, None, None]
        logits.masked_fill_((positions[:, None] > query_positions[lo : lo + step, None])[:, None], -torch.inf)
        total += shares(logits, sinks).nan_to_num_().sum(2).mean(1)
    return total
