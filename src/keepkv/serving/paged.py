"""Paged: one layer's keys, values, votes and positions in an engine's pages, and one step of a request over them.

A page holds `block` cells of every KV head. Cell i of a page is, for every head separately, that head's i-th entry: heads keep
different tokens, but equally many. Slots lie in a request's first budget / block pages; the tokens that are held exactly lie
where the engine puts them, token t in page t // block; the pages between belong to nobody any more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from keepkv.attend.dispatch import attend_tail
from keepkv.cache.layer import KeepLayer
from keepkv.cache.observations import Observations
from keepkv.compress import compress
from keepkv.methods import Method
from keepkv.observe.watch import Watch
from keepkv.serving.settings import Settings
from keepkv.slots.slots import Slots

CELL = 16  # bytes behind every key and value: the vote's logarithm (float32), the position (int32), and 8 unused


class Pages(NamedTuple):
    """One layer's pages, views into the engine's tensor: keys [N, H, block, d] and values [N, H, block, d_v] in the model's
    dtype, bias float32 and positions int32 [N, H, block]."""

    keys: Tensor
    values: Tensor
    bias: Tensor
    positions: Tensor

    @classmethod
    def of(cls, cells: Tensor, size: int, value_size: int) -> Pages:
        """cells [N, H, block, C] in the model's dtype, C elements being a key, a value and CELL bytes."""
        tail = cells[..., size + value_size :]
        keys, values = cells[..., :size], cells[..., size : size + value_size]
        return cls(keys, values, tail.view(torch.float32)[..., 0], tail.view(torch.int32)[..., 1])

    @property
    def block(self) -> int:
        return self.keys.shape[2]

    def write(self, cells: Tensor, keys: Tensor, values: Tensor) -> None:
        """New tokens: keys and values [n, H, d], at cells int64 [n] (page × block + place; negative: nowhere)."""
        real = cells >= 0
        if not bool(real.all()):
            cells, keys, values = cells[real], keys[real], values[real]
        page, place = cells // self.block, cells % self.block
        self.keys[page, :, place], self.values[page, :, place] = keys, values

    def tokens(self, table: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys and values [H, last - first, d] of a request's tokens; `first` begins a page. table: its pages."""
        pages = table[first // self.block : -(-last // self.block)].long()
        keys, values = (x[pages].transpose(0, 1).flatten(1, 2)[:, : last - first] for x in (self.keys, self.values))
        return keys, values

    def slots(self, table: Tensor, budget: int) -> Slots:
        """A request's compact part."""
        pages = table[: budget // self.block].long()
        keys, values, bias, positions = (x[pages].transpose(0, 1).flatten(0, 2) for x in self)
        heads = self.keys.shape[1]
        return Slots(keys, values, bias, positions, tuple(range(0, (heads + 1) * budget, budget)))

    def store(self, table: Tensor, budget: int, slots: Slots) -> None:
        """Writes a compact part of at most `budget` slots a head; what is left over is masked: its bias is -inf."""
        pages = table[: budget // self.block].long()
        fills = (0, 0, -torch.inf, -1)
        for own, x, fill in zip(self, slots.padded(), fills, strict=True):
            room = (0, 0) * (x.ndim - 2) + (budget - x.shape[1], 0)
            whole = pad(x, room, value=fill)
            whole = whole.view(len(whole), -1, self.block, *whole.shape[2:])
            own[pages] = whole.transpose(0, 1).to(own.dtype)


class Lot(NamedTuple):
    """What the layers of one engine have in common: settings, the method's row, the attention's scale, rotary frequencies."""

    settings: Settings
    row: Method
    scale: float
    inv_freq: Tensor


def watcher(lot: Lot, layer: int) -> Watch:
    """What a layer observes of a new request."""
    return Watch(layer, lot.settings.references, lot.settings.seed, lot.row.column_mass, lot.scale, rounded=True)


def step(pages: Pages, table: Tensor, query: Tensor, before: int, lot: Lot, watch: Watch) -> tuple[Tensor, Watch]:
    """One forward pass of a request in one layer: attention, then a compression if one is due.

    query [n, H_q, d], of the newest n of the request's tokens, whose keys and values are in the pages already; before: tokens
    computed earlier. Returns the output [n, H_q, d_v] and what has been observed now. The state is that of a live KeepCache
    with tail = window that is compressed when `Settings.covered` grows.
    """
    settings, new = lot.settings, len(query)
    seen, covered = before + new, settings.covered(before)
    layer = KeepLayer()
    keys, values = pages.tokens(table, covered, seen)
    layer.lazy_initialization(keys[None], values[None])
    layer.keys, layer.values, layer.seen = keys[None], values[None], seen
    layer.slots = pages.slots(table, settings.budget) if covered else None

    asked = query.transpose(0, 1)[None]  # [1, H_q, n, d]
    grouped = asked.reshape(1, layer.heads, -1, new, query.shape[-1])
    if layer.slots is not None:
        output = layer.attend(asked, None, lot.scale, new)
    else:
        causal = torch.ones(new, seen, dtype=torch.bool, device=query.device).tril(before)[None, None] if new > 1 else None
        output = attend_tail(grouped.flatten(2, 3), layer.keys, layer.values, causal, lot.scale)[0].to(query.dtype)
        output = output.reshape(*asked.shape[:-1], -1)
    layer.watch = watch.see(grouped.clone(), layer.state, None)  # the engine's buffers are used again
    then = settings.covered(seen)
    if then > covered:
        _compact(layer, pages, table, seen - then, lot)
    return output[0].transpose(0, 1), layer.watch


def _compact(layer: KeepLayer, pages: Pages, table: Tensor, tail: int, lot: Lot) -> None:
    """All but the newest `tail` tokens become slots, in the request's first pages; the layer's watch is told."""
    assert layer.watch is not None
    layer.watch = layer.watch.banked(layer.state)
    observations = Observations([layer], 0, lot.inv_freq, [None], tail=tail)
    made = compress(observations, lot.row, (lot.settings.budget + tail) * layer.heads)
    pages.store(table, lot.settings.budget, made.slots[0].newest_off(tail))
    layer.watch = layer.watch.compacted([made.plan.kept[0]], layer.state)
