"""Rotary positions: a rotation by a distance is the model's own."""

from __future__ import annotations

import pytest
import torch

from helpers import make_model, randn
from keepkv.models import families
from keepkv.ops.rope import rotate


@pytest.mark.parametrize("family", ["llama", "llama-scaled-rope", "phi3", "gemma3", "qwen3"])
@pytest.mark.parametrize("shift", [0, 1, 777, -300])
def test_rotation_is_the_models_own(family: str, shift: int) -> None:
    """Rotating a query asked at p by `shift` gives what the model itself computes at p + shift."""
    model = make_model(family, torch.float32)
    rotary = families.rotary(model)
    kind = {"layer_type": "full_attention"} if family == "gemma3" else {}
    query, position = randn(1, 4, 9, 16), torch.arange(300, 309)[None]

    def at(where: torch.Tensor) -> torch.Tensor:
        cos, sin = rotary(query, where, **kind)
        size = cos.shape[-1]
        turned = query[..., :size]
        half = torch.cat((-turned[..., size // 2 :], turned[..., : size // 2]), -1)
        return torch.cat((turned * cos[:, None] + half * sin[:, None], query[..., size:]), -1)

    got = rotate(at(position), torch.full((9,), shift), families.inv_freq(rotary))
    torch.testing.assert_close(got, at(position + shift), rtol=1e-3, atol=1e-3)
