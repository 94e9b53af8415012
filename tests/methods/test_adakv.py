"""Ada-KV: a layer's slots are shared among its heads."""

from __future__ import annotations

import torch

from keepkv import allot


def test_adakv_shares_a_layers_slots_among_its_heads_only() -> None:
    scores = torch.rand(3, 2, 100)
    scores[1, 1] *= 100
    counts = allot.within_layers(scores, 240)
    assert [sum(layer) for layer in counts] == [80, 80, 80]
    assert counts[1] == [8, 72]  # a fifth of 40 is safe
    everything = allot.within_layers(scores, 600)
    assert everything == [[100, 100]] * 3
