"""The report of a cache: its bytes are those of the storages."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from helpers import make_model, read, stored, tokens
from keepkv import KeepCache
from keepkv.cache.layer import KeepLayer

LENGTH = 120


@pytest.mark.parametrize("method", ["keepkv", "streaming", "full"])
def test_reported_bytes_are_the_storages(family: str, method: str) -> None:
    model = make_model(family, torch.bfloat16)
    cache = read(model, tokens(2, LENGTH), budget=0.2, method=method)
    assert cache.report().kv_bytes == stored(cache)
    for step in range(3):
        model(tokens(2, 1, seed=step), past_key_values=cache)
    report = cache.report()
    assert report.kv_bytes == stored(cache)
    assert report.tail == (3 if method != "full" else LENGTH + 3)
    full = DynamicCache(config=model.config)
    model(tokens(2, LENGTH + 3), past_key_values=full)
    plain = [layer for ours, layer in zip(cache.layers, full.layers, strict=True) if isinstance(ours, KeepLayer)]
    sliding = sum(
        x.untyped_storage().nbytes()
        for layer in cache.layers
        if not isinstance(layer, KeepLayer)
        for x in (layer.keys, layer.values)
    )
    assert report.kv_bytes_full == sum(x.nbytes for layer in plain for x in (layer.keys, layer.values)) + sliding


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float32, "sdpa"), (torch.float64, "eager (sdpa computes in float32")])
def test_the_report_says_what_attends_to_the_slots(dtype: torch.dtype, backend: str) -> None:
    model = make_model(dtype=dtype)
    cache = KeepCache(model, budget=0.5)
    model(torch.arange(3, 60)[None], past_key_values=cache)
    assert cache.report().backend.startswith(backend)
