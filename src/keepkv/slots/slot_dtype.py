"""SlotDtype: how slots' keys and values are stored, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.errors import InputError, nearest
from keepkv.slots.by_channel import TILE, QuantizedByChannel
from keepkv.slots.by_vector import QuantizedByVector
from keepkv.slots.cast import Cast
from keepkv.slots.slots import BESIDE, Slots
from keepkv.slots.vectors import Stack


class Price(NamedTuple):
    """What slots cost. n slots of one head take at most n × slot + head bytes.

    Attributes:
        slot: Bytes of one slot: key, value, vote, position, and its part of what the slots of a tile share.
        head: Bytes that a head may need more, because its last tile is not full.
        token: Bytes of a token's key and value in the full cache.
    """

    slot: float
    head: float
    token: int


@dataclass(frozen=True)
class SlotDtype:
    """How slots' keys and values are stored.

    | name | keys | values |
    |---|---|---|
    | float | as the model computes them | likewise |
    | bfloat16 | rounded to bfloat16 | likewise |
    | int8, int4, int2 | integers by channel (`QuantizedByChannel`) | integers by vector (`QuantizedByVector`) |

    Args:
        name: As `slot_dtype` has it.
        bits: Of an integer; 0 where vectors are stored as floating-point numbers.
    """

    name: str
    bits: int = 0

    @property
    def rounds(self) -> bool:
        """Whether something is stored in another way than the model computes it, even where every token is kept."""
        return self.name != "float"

    def store_keys(self, keys: Tensor, counts: Sequence[int]) -> Stack:
        """Keys [n, d] of heads of so many slots, one after the other, stored in this way."""
        if self.bits:
            return QuantizedByChannel.of(keys, self.bits, counts)
        return Cast.of(keys, torch.bfloat16) if self.rounds else keys

    def store_values(self, values: Tensor) -> Stack:
        """Values [n, d_v], stored in this way."""
        if self.bits:
            return QuantizedByVector.of(values, self.bits)
        return Cast.of(values, torch.bfloat16) if self.rounds else values

    def stored(self, slots: Slots) -> Slots:
        """Slots, stored in this way."""
        return replace(slots, keys=self.store_keys(slots.keys[:], slots.counts), values=self.store_values(slots.values[:]))

    def round_keys(self, keys: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """Keys [H, T, d], those that each head keeps as they will be read."""
        rounded = keys.clone()
        for head, entries in enumerate(kept):
            rounded[head, entries] = self.store_keys(keys[head, entries], [len(entries)])[:]
        return rounded

    def round_values(self, values: Tensor) -> Tensor:
        """Values [..., d_v] as they will be read."""
        return self.store_values(values.flatten(0, -2))[:].view(values.shape) if self.rounds else values

    def price(self, size: int, value_size: int, element: int, full_element: int | None = None) -> Price:
        """What slots of keys of `size` and values of `value_size` numbers cost.

        Args:
            size: d.
            value_size: d_v.
            element: Bytes of a number as the model computes it.
            full_element: Bytes of a number in the full cache. None: the same.

        Example:
            >>> SLOT_DTYPES["int4"].price(64, 64, element=2)
            Price(slot=78.0, head=252.0, token=256)
        """
        token = (size + value_size) * (full_element or element)
        if not self.bits:
            return Price(float((size + value_size) * (min(2, element) if self.rounds else element) + BESIDE), 0.0, token)
        tile = QuantizedByChannel.tile_bytes(size, element)
        own = QuantizedByChannel.code_bytes(size, self.bits) + QuantizedByVector.vector_bytes(value_size, self.bits) + BESIDE
        return Price(own + tile / TILE, tile * (1 - 1 / TILE), token)


FLOAT = SlotDtype("float")
AUTO = SlotDtype("auto")  # the format of AUTO_FORMATS that loses least, see `KeepCache.compress`
SLOT_DTYPES = {
    slot_dtype.name: slot_dtype
    for slot_dtype in (FLOAT, SlotDtype("bfloat16"), SlotDtype("int8", 8), SlotDtype("int4", 4), SlotDtype("int2", 2))
}
# For the same bytes, 16 bits lost more than 8 in every cell that was measured, and 2 bits more than 4: docs/notes. The first is
# for methods that measure no error, and for live caches, where folds round keys again and again.
AUTO_FORMATS = (SLOT_DTYPES["int8"], SLOT_DTYPES["int4"])


def slot_dtype_of(name: str) -> SlotDtype:
    """The way to store slots that is called `name`. Raises InputError."""
    if name == AUTO.name:
        return AUTO
    if name not in SLOT_DTYPES:
        raise InputError(f"slot_dtype {name!r}: {nearest(name, [AUTO.name, *SLOT_DTYPES])}")
    return SLOT_DTYPES[name]
