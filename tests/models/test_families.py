"""What can be seen of a model without running it. What must be tried is in tests/cache/test_self_check.py."""

from __future__ import annotations

import pytest
import torch

from helpers import make_model, small_model
from keepkv import KeepCache, ModelError
from keepkv.models import families


def test_models_without_rotary_positions_and_without_full_attention_are_refused() -> None:
    with pytest.raises(ModelError, match="gpt2 does not rotate its keys"):
        KeepCache(small_model("gpt2"))
    with pytest.raises(ModelError, match="sliding window"):
        KeepCache(make_model("mistral", sliding_window=16))


def test_projections_are_those_of_the_compressed_layers() -> None:
    model = make_model("gemma3")
    expected = [layer.self_attn.o_proj.weight for layer in model.get_decoder().layers[1:]]
    assert all(torch.equal(a, b) for (a,), b in zip(families.projections(model), expected, strict=True))
    assert families.projections(small_model("gpt_neox")) == [None] * 4  # they are not called o_proj
    assert set(families.projections(small_model("hrm_text"))) == {None}  # its modules serve several layers each
    shared = small_model("gemma4_text")  # 12 layers, of which 5 and 11 have full attention and the same keys
    expected = [shared.get_decoder().layers[index].self_attn.o_proj.weight for index in (5, 11)]
    assert all(torch.equal(a, b) for a, b in zip(families.projections(shared)[0], expected, strict=True))


def test_kinds_of_layers_are_told_apart() -> None:
    kinds = {kind: families.layer_kinds(small_model(kind)) for kind in ("gemma4_text", "falcon_h1", "nemotron_h")}
    compressed = {kind: [index for index, x in enumerate(own) if families.is_compressed(x)] for kind, own in kinds.items()}
    assert compressed == {"gemma4_text": [5], "falcon_h1": [0, 1, 2, 3], "nemotron_h": [2]}
    assert [kinds["gemma4_text"][5].users, kinds["falcon_h1"][0].states, kinds["nemotron_h"][2].states] == [2, 1, 0]


def test_keys_may_have_other_sizes_where_nothing_is_compressed() -> None:
    model = small_model("mimo_v2_flash")
    heads, size = families.key_shape(model)
    cache = KeepCache(model, auto=False)
    model(torch.arange(3, 9)[None], past_key_values=cache)
    shapes = {(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers}
    assert {(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.keep_layers} == {(heads, size)} < shapes


def test_the_shape_of_keys_is_that_of_the_keys(family: str) -> None:
    model = make_model(family)
    cache = KeepCache(model, auto=False)
    model(torch.arange(3, 9)[None], past_key_values=cache)
    assert all((layer.keys.shape[1], layer.keys.shape[3]) == families.key_shape(model) for layer in cache.layers)
