"""Caches of any length and batch, filled at random in no time: for speed, which does not depend on what they hold."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from keepkv import KeepCache
from keepkv.slots.slots import Slots


def ragged(batch: int, heads: int, mean: int, size: int, like: torch.Tensor) -> Slots:
    """Random slots of `mean` per head on average, from a fifth to nine fifths of it."""
    draw = torch.rand(batch * heads, generator=torch.Generator().manual_seed(0))
    counts = ((0.2 + 1.6 * draw / draw.mean() / 2) * mean).int().tolist()
    total = sum(counts)
    keys, values = (torch.randn(total, size, device=like.device, dtype=like.dtype) for _ in range(2))
    positions = torch.arange(total, device=like.device, dtype=torch.int32)
    return Slots(keys, values, torch.rand(total, device=like.device), positions, (0, *accumulate(counts)))


def shape(model: Any) -> tuple[int, int, int]:
    """Layers, KV heads and head size of a model whose layers are alike."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, size


def dense(model: Any, batch: int, tokens: int) -> DynamicCache:
    """transformers' own cache with so many tokens."""
    layers, heads, size = shape(model)
    like, cache = model.lm_head.weight, DynamicCache()
    for index in range(layers):
        state = torch.randn(batch, heads, tokens, size, device=like.device, dtype=like.dtype)
        cache.update(state, state.clone(), index)
    return cache


def compact(model: Any, batch: int, tokens: int, slots: int) -> KeepCache:
    """A KeepCache that has read so many tokens and holds `slots` per head on average, heads of different lengths."""
    _, heads, size = shape(model)
    like = model.lm_head.weight
    cache = KeepCache(model, "50%", "streaming", slot_dtype="float")
    model(torch.zeros(batch, 16, dtype=torch.int64, device=like.device), past_key_values=cache, logits_to_keep=1)
    for layer in cache.keep_layers:
        layer.slots, layer.seen = ragged(batch, heads, slots, size, like), tokens
        layer.keys, layer.values = layer.keys[:, :, :0].clone(), layer.values[:, :, :0].clone()
    return cache


def kv_bytes(cache: Cache) -> int:
    """Of what is stored now, slots and tail."""
    if isinstance(cache, KeepCache):
        tensors = [x for layer in cache.keep_layers for x in (*layer.slots.tensors, layer.keys, layer.values)]
        return sum(x.nbytes for x in tensors)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def timed(run: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """What returns the seconds of one run, by the device's clock where it has one."""

    def clock() -> float:
        if device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    return clock
