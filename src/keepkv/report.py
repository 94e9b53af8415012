"""What a cache holds: tokens, slots, votes, and bytes as they are really stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Report:
    """What was kept of the prompt, and what the cache holds now.

    tokens: read per batch row, without padding. kept[row][layer][head]: slots of the compact part; empty if nothing
    was compressed. slots: the mean of those. tail: exact tokens read since. max_vote: the largest number of tokens' mass
    that one slot stands for. kv_bytes: bytes of the storages held; kv_bytes_full: of a cache of all tokens seen.
    fallbacks: heads where the fit lost to eviction on held-out queries, or keys where ZIP was near its pole. error:
    the median over heads of the output error on held-out queries (a share), 0 for methods that hold nothing out.
    note: why nothing was compressed, if so.
    """

    method: str
    budget: str
    tokens: tuple[int, ...]
    kept: tuple[tuple[tuple[int, ...], ...], ...] = field(default=(), repr=False)
    slots: float = 0.0
    tail: int = 0
    max_vote: float = 1.0
    fallbacks: int = 0
    error: float = 0.0
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    compress_seconds: float = 0.0
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times smaller than the full cache."""
        return self.kv_bytes_full / max(1, self.kv_bytes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def held_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct storages behind the tensors: what is really held, views counted with all they keep alive."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr(), storage.device] = storage.nbytes()
    return sum(storages.values())
