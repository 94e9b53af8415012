"""Files that released versions have written load bit for bit: tests/fixtures has some of every format."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import ROOT
from keepkv import Recipe, load

FIXTURES = ROOT / "tests" / "fixtures"


def fixed_model() -> LlamaForCausalLM:
    """Weights that are the same whatever draws random numbers: multiples of 1/64."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            waves = (torch.arange(parameter.numel(), dtype=torch.float64) * 12.9898 + number).sin() * 43758.5453
            parameter.copy_(((waves - waves.floor() - 0.5) * 64).round().view(parameter.shape) / 64)
    return model


@pytest.mark.parametrize("name", ["plain", "int4"])
def test_format_3_loads_bit_for_bit(name: str) -> None:
    wanted, model = json.loads((FIXTURES / "format3.json").read_text())[name], fixed_model()
    document = load(FIXTURES / f"format3-{name}.keep", model, "fixture")
    digest = hashlib.sha256()
    for layer in document.cache.keep_layers:
        for tensor in (*layer.slots.tensors, layer.keys, layer.values):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == wanted["sha256"]
    report = document.cache.report()
    assert (report.slots_per_head, report.slot_dtype) == (wanted["slots"], "float" if name == "plain" else name)
    slot_dtype = "float" if name == "plain" else "int4"
    assert document.recipe == Recipe(
        "40%", "keepkv", slot_dtype, "always", ("a+",), chunk=0, seed=3
    )  # its words were others: reference recall, slots
    with torch.inference_mode():
        logits = model(torch.tensor([[9, 10, 11, 12]]), past_key_values=document.cache.fork()).logits[0, -1, :16]
    torch.testing.assert_close(logits, torch.tensor(wanted["logits"]), atol=1e-4, rtol=1e-4)
