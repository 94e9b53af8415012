"""MiniCache in a model: both layers of a pair keep the same tokens."""

from __future__ import annotations

import torch

from helpers import make_model, tokens
from keepkv import KeepCache


def test_minicache_keeps_the_same_tokens_in_both_layers_of_a_pair() -> None:
    model = make_model("llama", torch.float32, num_hidden_layers=4)
    cache = KeepCache(model, 0.3, "minicache")
    model(tokens(1, 200), past_key_values=cache)
    layers = [layer.slots for layer in cache.keep_layers]
    assert torch.equal(layers[1].positions, layers[2].positions)
    assert layers[1].keys.blocks[0].directions is layers[2].keys.blocks[0].directions
    assert not torch.equal(layers[0].positions, layers[1].positions)
