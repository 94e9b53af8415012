"""Rotations are asked of the model: what keepkv moves is what the model itself makes at the other place."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from helpers import FAMILIES, make_model, randn64, small_model, tokens
from keepkv import KeepCache, ModelError
from keepkv.models.rotation import Rotaries, Rotary, attention_modules, candidates
from keepkv.ops.rope import Rotation

# Rotate other pairs, not everywhere, not in all dimensions, in the other direction, or with complex numbers.
TYPES = ("cohere", "glm4", "ernie4_5", "gpt_neox", "phi", "nanochat", "llama4_text", "smollm3", "olmo3", "falcon", "hrm_text")
SCALED = {
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
}  # fmt: skip


def alone(model, places: list[int], end: int = 0) -> tuple[KeepCache, list[list[Tensor]]]:
    """Queries and keys [n, 1, d] of three tokens, each read alone at every place; and of a token at `end`, beside them."""
    rows = [place for place in places for _ in range(3)] + [end] * bool(end)
    ids = tokens(1, 3)[0].repeat(len(places) + bool(end))[: len(rows), None]
    cache = KeepCache(model, auto=False)
    model(ids, past_key_values=cache, position_ids=torch.tensor(rows)[:, None])
    own = []
    for layer in cache.keep_layers:
        pair = [layer.keys, torch.cat(layer.watch.pending, 3)]
        own.append([torch.cat([x[3 * n : 3 * n + 3].reshape(-1, 1, x.shape[-1]) for x in pair]) for n in range(len(places))])
    return cache, own


def check_moves(model, here: int, there: int, rotations: list[Rotation] | None = None, end: int = 0) -> None:
    cache, layers = alone(model, [here, there], end)
    shift = torch.tensor([there - here])
    for rotation, (first, second) in zip(rotations or cache.keep_rotations, layers, strict=True):
        torch.testing.assert_close(rotation.rotate(first, shift), second, rtol=1e-5, atol=3e-5 * float(first.abs().max()))
        torch.testing.assert_close(rotation.rotate(second, -shift), first, rtol=1e-5, atol=3e-5 * float(first.abs().max()))


@pytest.mark.parametrize("type_", TYPES)
def test_what_is_moved_is_what_the_model_makes_there(type_: str) -> None:
    check_moves(small_model(type_), 40, 240)


def test_what_is_moved_is_what_every_family_makes_there(family: str) -> None:
    check_moves(make_model(family), 240, 40)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_scaled_rotations_are_moved_without_being_scaled_twice(kind: str) -> None:
    model = make_model(rope_parameters=SCALED[kind])
    check_moves(model, 40, 240)
    rotation = KeepCache(model).rotations[0]
    query = randn64(2, 5, 16)
    moved = rotation.rotate(query, torch.full((5,), 77))
    torch.testing.assert_close(moved.norm(dim=-1), query.norm(dim=-1))  # whatever the attention scaling is
    assert not torch.equal(moved, query)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_frequencies_are_the_models_to_the_last_bit(family: str) -> None:
    model = make_model(family, torch.float32)
    held = {name: buffer.double() for name, buffer in model.get_decoder().rotary_emb.named_buffers()}
    for layer, rotation in zip(KeepCache(model).layers, KeepCache(model).rotations, strict=True):
        kind = "sliding_attention" if hasattr(layer, "sliding_window") else "full_attention"
        assert torch.equal(rotation.frequencies, held[f"{kind}_inv_freq" if family == "gemma3" else "inv_freq"])


def test_angles_hold_at_long_distances() -> None:
    """A float32 angle would be off by .06 there; float64 of the model's own frequencies is not."""
    rotation = KeepCache(make_model(dtype=torch.float32)).rotations[0]
    inv_freq = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    angle = 1_000_003 * inv_freq.double()
    query = randn64(1, 16)
    a, b = query[..., :8], query[..., 8:]
    expected = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    torch.testing.assert_close(rotation.rotate(query, torch.tensor([1_000_003])), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [40, 300])
def test_frequencies_that_change_with_the_length_are_those_of_the_text(length: int) -> None:
    """Phi-3 within and past its original length of 64, and NTK scaling that grows: the model's own, for a text so long."""
    phi3 = make_model("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64)
    dynamic = make_model(rope_parameters=SCALED["dynamic"], max_position_embeddings=64)
    for model in (phi3, dynamic):
        cache = KeepCache(model)
        assert not cache.rotaries.fixed
        model(tokens(1, length), past_key_values=cache)
        rotations = cache.rotations
        buffer = model.get_decoder().rotary_emb.inv_freq.double()
        torch.testing.assert_close(rotations[0].frequencies, buffer, rtol=1e-4, atol=1e-8)
        check_moves(model, 3, 33, rotations, end=length - 1)


def test_asking_leaves_a_model_as_it_was() -> None:
    model = make_model(rope_parameters=SCALED["dynamic"], max_position_embeddings=64)
    before = model.get_decoder().rotary_emb.inv_freq.clone()
    ids = tokens(1, 50)
    logits = model(ids).logits
    assert not KeepCache(model).rotaries.fixed
    assert torch.equal(model.get_decoder().rotary_emb.inv_freq, before)
    assert torch.equal(model(ids).logits, logits)


def test_a_rotation_keeps_no_weights_alive() -> None:
    model = make_model()
    rotaries = KeepCache(model).rotaries
    weight = weakref.ref(model.get_decoder().layers[0].self_attn.q_proj.weight)
    del model
    gc.collect()
    assert weight() is None
    assert len(rotaries.at(10)) == 3


def test_a_function_that_is_no_rotation_is_refused() -> None:
    model = make_model()
    (rotary, *_) = candidates(model, 16)[0]

    def growing(q, k, cos, sin):
        return q * (2 - cos.mean(-1, keepdim=True)), k

    with pytest.raises(ModelError, match="more than to rotate pairs"):
        Rotary(growing, rotary.module, None, 16).rotation()


def test_layers_without_rotation_move_nothing() -> None:
    (rotation,) = Rotaries([None]).at(5)
    query = randn64(3, 16)
    assert torch.equal(rotation.rotate(query, torch.full((3,), 9)), query)


def test_attention_modules_are_found_by_what_they_call() -> None:
    assert sorted(attention_modules(make_model())) == [0, 1, 2]
    assert attention_modules(small_model("gpt2")) == {}
