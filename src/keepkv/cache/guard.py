"""Guard: what happens to a cache happens whole or not at all, and a cache that something has torn says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from keepkv.cache import other_layers
from keepkv.cache.layer import KeepLayer
from keepkv.errors import KeepKVError

if TYPE_CHECKING:
    from keepkv.cache.base import BaseCache


@contextmanager
def all_or_nothing(cache: BaseCache) -> Iterator[None]:
    """If the block raises, whatever it is, the cache and its layers are as they were before.

    That costs nothing but references, since keys and values are never written to, and a copy of recurrent states, which are.
    """
    own, layers = dict(vars(cache)), list(cache.layers)
    states = [dict(vars(other_layers.forked(layer))) for layer in layers]
    try:
        yield
    except BaseException:
        _restore(cache, own)
        cache.layers = layers
        for layer, state in zip(layers, states, strict=True):
            _restore(layer, state)
        raise


def _restore(holder: Any, state: dict[str, Any]) -> None:
    vars(holder).clear()
    vars(holder).update(state)


def holds_keys(layer: Any) -> bool:
    """Whether a layer holds keys of its own, and so knows how many tokens it has read."""
    return isinstance(layer, KeepLayer) or other_layers.has_window(layer)


def check_whole(layers: Sequence[Any]) -> None:
    """Raises KeepKVError for layers that have not read the same tokens: a forward pass broke off between them."""
    lengths = {layer.get_seq_length() for layer in layers if holds_keys(layer)}
    if len(lengths) > 1:
        raise KeepKVError(
            f"this cache is torn: a forward pass broke off, and its layers hold {min(lengths):,} to {max(lengths):,} tokens. "
            "Go on from a fork() that was made before, or reset() it and read the text again"
        )
