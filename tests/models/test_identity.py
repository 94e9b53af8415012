"""What identifies a model."""

from __future__ import annotations

import torch

from helpers import make_model
from keepkv.models import identity


def test_one_changed_weight_is_another_model(model_and_tokenizer) -> None:
    model = make_model("llama", torch.float32)
    before = identity.of_model(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    kept = weight[13, 17].item()
    weight[13, 17] = kept + 1e-3
    assert identity.of_model(model)["weights"] != before["weights"]
    weight[13, 17] = kept
    assert identity.of_model(model) == before
