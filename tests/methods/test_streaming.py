"""StreamingLLM with shifted positions."""

from __future__ import annotations

import torch

from helpers import make_model, randn64, tokens
from keepkv import KeepCache
from keepkv.methods import streaming
from keepkv.types import Choice
from methods.observed import ROTATION, seen


def test_streaming_closes_the_gap_between_sinks_and_window() -> None:
    """A query p after the text sees the sinks at their distance within the cache, and the window where it was."""
    observation = seen()
    kept = torch.tensor([0, 1, 2, 3, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59])
    (made, _) = streaming.closed_up(observation, [Choice(kept), Choice(kept)])
    torch.testing.assert_close(made.keys[4:], observation.keys[0, 50:])
    query = randn64(1, 16, seed=3).float()
    near = ROTATION.rotate(query, torch.tensor([60])) @ made.keys[:4].T
    plain = ROTATION.rotate(observation.keys[0, :4], -torch.arange(4))  # the sinks without a position
    wanted = ROTATION.rotate(query, torch.tensor([14])) @ ROTATION.rotate(plain, torch.arange(4)).T  # the cache has 14 entries
    torch.testing.assert_close(near, wanted, rtol=1e-4, atol=1e-4)


def test_streaming_shifted_again_and_again_is_as_shifted_once() -> None:
    model, ids = make_model("llama", torch.float64), tokens(1, 120)
    live = KeepCache(model, 24, "streaming-shifted", period=1, auto=False, slot_dtype="float")
    once = KeepCache(model, 24, "streaming-shifted", auto=False, slot_dtype="float")
    model(ids[:, :60], past_key_values=live)
    model(ids[:, :60], past_key_values=once)
    first = [layer.keys.clone() for layer in live.keep_layers]
    live.compress()
    again = live.fork().compress(20)  # what stands without gaps is not turned a second time
    once.compress(20)
    for ours, theirs, whole in zip(again.keep_layers, once.keep_layers, first, strict=True):
        assert torch.equal(ours.slots.positions, theirs.slots.positions)
        torch.testing.assert_close(ours.slots.keys, theirs.slots.keys, rtol=1e-5, atol=1e-5)
        assert not torch.equal(ours.slots.keys[:4], whole[0, 0, :4])
