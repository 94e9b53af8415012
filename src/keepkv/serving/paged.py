"""Paged: one layer's keys, values, votes and positions in an engine's pages, and one step of a request over them.

A page holds `block` cells of every KV head. Cell i of a page is, for every head separately, that head's i-th entry: heads keep
different tokens, but equally many. Slots lie in a request's first budget / block pages. Tokens that are kept exactly lie where
the engine puts them, token t in page t // block. The pages between have been freed.
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
from keepkv.ops.rope import Rotation
from keepkv.serving.settings import Settings
from keepkv.slots.slots import Slots

CELL = 16  # bytes behind every key and value: the logarithm of the vote (float32), the position (int32), and 8 unused


class Pages(NamedTuple):
    """One layer's pages: views into the engine's tensor, in which N pages of `block` cells have H KV heads each.

    Args:
        keys: [N, H, block, d] in the model's dtype.
        values: [N, H, block, d_v] in the model's dtype.
        bias: The votes' logarithms, float32 [N, H, block].
        positions: int32 [N, H, block].
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    positions: Tensor

    @classmethod
    def of(cls, cells: Tensor, size: int, value_size: int) -> Pages:
        """The views of cells [N, H, block, C] in the model's dtype, whose C elements are a key, a value and CELL bytes."""
        keys = cells[..., :size]
        values = cells[..., size : size + value_size]
        rest = cells[..., size + value_size :]
        return cls(keys, values, rest.view(torch.float32)[..., 0], rest.view(torch.int32)[..., 1])

    @property
    def block(self) -> int:
        """Cells of a page."""
        return self.keys.shape[2]

    def write(self, cells: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes new tokens.

        Args:
            cells: Where, int64 [n]: page × block + place in the page. Tokens with a negative cell are not written.
            keys: [n, H, d].
            values: [n, H, d_v].
        """
        real = cells >= 0
        if not bool(real.all()):
            cells, keys, values = cells[real], keys[real], values[real]
        page = cells // self.block
        place = cells % self.block
        self.keys[page, :, place] = keys
        self.values[page, :, place] = values

    def tokens(self, table: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys and values [H, last - first, d] of a request's tokens from `first`, which begins a page, to `last` - 1.

        Args:
            table: The request's pages.
            first: The first token.
            last: The token after the last.
        """
        pages = table[first // self.block : -(-last // self.block)].long()
        keys, values = (x[pages].transpose(0, 1).flatten(1, 2)[:, : last - first] for x in (self.keys, self.values))
        return keys, values

    def slots(self, table: Tensor, budget: int) -> Slots:
        """A request's slots, `budget` for every head. table: its pages."""
        pages = table[: budget // self.block].long()
        keys, values, bias, positions = (x[pages].transpose(0, 1).flatten(0, 2) for x in self)
        heads = self.keys.shape[1]
        return Slots(keys, values, bias, positions, tuple(range(0, (heads + 1) * budget, budget)))

    def store(self, table: Tensor, budget: int, slots: Slots) -> None:
        """Writes at most `budget` slots for every head. Cells that are left over are masked: their bias is -inf."""
        pages = table[: budget // self.block].long()
        fills = (0, 0, -torch.inf, -1)
        for target, source, fill in zip(self, slots.padded(), fills, strict=True):
            left_over = (0, 0) * (source.ndim - 2) + (budget - source.shape[1], 0)
            padded = pad(source, left_over, value=fill)
            in_pages = padded.view(len(padded), -1, self.block, *padded.shape[2:])
            target[pages] = in_pages.transpose(0, 1).to(target.dtype)


class PagedConfig(NamedTuple):
    """What the layers of one engine have in common.

    Args:
        settings: What is kept of every request.
        method: `settings.uniform_method()`.
        scale: The attention's scale.
        rotation: How keys and queries turn with their position.
    """

    settings: Settings
    method: Method
    scale: float
    rotation: Rotation


def new_watch(config: PagedConfig, layer: int) -> Watch:
    """What a layer has observed of a new request: nothing yet."""
    settings = config.settings
    return Watch(layer, settings.references, settings.seed, config.method.column_mass, config.scale, rounded=True)


def step(pages: Pages, table: Tensor, query: Tensor, before: int, config: PagedConfig, watch: Watch) -> tuple[Tensor, Watch]:
    """One forward pass of a request in one layer: attention, then a compression if one is due.

    The request's state is that of a live KeepCache with tail = window that is compressed whenever `Settings.covered` grows.

    Args:
        pages: The layer's pages, which hold the keys and values of the new tokens already.
        table: The request's pages.
        query: [n, H_q, d] of the request's newest n tokens.
        before: Tokens of the request that were computed earlier.
        config: What the engine's layers have in common.
        watch: What the layer has observed of the request so far.

    Returns:
        The output [n, H_q, d_v], and what has been observed now.
    """
    settings = config.settings
    new = len(query)
    seen = before + new
    covered = settings.covered(before)
    layer = KeepLayer()
    keys, values = pages.tokens(table, covered, seen)
    layer.lazy_initialization(keys[None], values[None])
    layer.keys = keys[None]
    layer.values = values[None]
    layer.seen = seen
    layer.slots = pages.slots(table, settings.budget) if covered else None

    queries = query.transpose(0, 1)[None]  # [1, H_q, n, d]
    grouped = queries.reshape(1, layer.heads, -1, new, query.shape[-1])
    if layer.slots is not None:
        output = layer.attend(queries, None, config.scale, new)
    else:
        causal = torch.ones(new, seen, dtype=torch.bool, device=query.device).tril(before)[None, None] if new > 1 else None
        output = attend_tail(grouped.flatten(2, 3), layer.keys, layer.values, causal, config.scale)[0].to(query.dtype)
        output = output.reshape(*queries.shape[:-1], -1)
    layer.watch = watch.see(grouped.clone(), layer.state, None)  # the engine's buffers are used again
    now_covered = settings.covered(seen)
    if now_covered > covered:
        _compress(layer, pages, table, seen - now_covered, config)
    return output[0].transpose(0, 1), layer.watch


def _compress(layer: KeepLayer, pages: Pages, table: Tensor, tail: int, config: PagedConfig) -> None:
    """Turns all but the newest `tail` tokens into slots, in the request's first pages, and updates the layer's watch."""
    assert layer.watch is not None
    budget = config.settings.budget
    layer.watch = layer.watch.banked(layer.state)
    observations = Observations([layer], 0, [config.rotation], [None], tail=tail)
    result = compress(observations, config.method, (budget + tail) * layer.heads)
    pages.store(table, budget, result.slots[0].newest_off(tail))
    layer.watch = layer.watch.compacted([result.plan.kept[0]], layer.state)
