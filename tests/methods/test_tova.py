"""TOVA: the last query's shares, the same tokens in all heads."""

from __future__ import annotations

import torch

from helpers import make_model, tokens
from keepkv import KeepCache
from keepkv.methods import tova
from methods.observed import seen, shares


def test_tova_scores_by_the_last_query_over_all_heads_and_keeps_the_same_tokens_in_all() -> None:
    observation = seen()
    got, wanted = tova.last_query(observation), shares(observation, 1).mean((0, 1, 2))
    for head in got:
        torch.testing.assert_close(head.double(), wanted, rtol=1e-4, atol=1e-7)
    cache = KeepCache(make_model("llama", torch.float32), 0.3, "tova")
    make_model("llama", torch.float32)(tokens(1, 80), past_key_values=cache)
    for layer in cache.keep_layers:
        first, second = (
            layer.slots.positions[lo:hi] for lo, hi in zip(layer.slots.offsets, layer.slots.offsets[1:], strict=False)
        )
        assert torch.equal(first, second)
        assert int(first[-1]) == 79
