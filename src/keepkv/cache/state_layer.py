"""StateLayer: a layer with full attention that has a state beside its keys and values, as Falcon-H1 and Zamba 2 have."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import cache_utils

from keepkv.cache.layer import KeepLayer
from keepkv.models.families import FullAttention

# Older transformers do not have it, and no model with such layers.
_Both: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", cache_utils.CacheLayerMixin)


def keep_layer(kind: FullAttention) -> KeepLayer:
    """A layer of this kind that has read nothing."""
    return StateLayer(kind.users, kind.states) if kind.states else KeepLayer(kind.users)


class StateLayer(KeepLayer, _Both):  # type: ignore[misc]
    """The keys and values are compressed. The state is transformers' own, and stays as it is (other_layers.py)."""

    is_croppable = False  # what a state was before a token cannot be told from it
    is_compileable = False

    def __init__(self, users: int = 1, number_of_states: int = 1) -> None:
        super().__init__(users)
        cache_utils.LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        kind = KeepLayer if args else cache_utils.LinearAttentionLayer  # keys and values, or states by name
        kind.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        states = self.number_of_states
        super().reset()
        cache_utils.LinearAttentionLayer.__init__(self, states)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        cache_utils.LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]
