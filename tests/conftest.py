"""Tiny random models of every supported family, built here: nothing is downloaded."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from keepkv.cli import app

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-scaled-rope": ("Llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 128}}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5}),
    "gemma3": (
        "Gemma3",
        {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
         "query_pre_attn_scalar": 24},
    ),
}  # fmt: skip


def make_model(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny random model with sharper attention than fresh weights give, so that what is dropped is felt."""
    name, extra = FAMILIES[family]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    model_class = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **extra, **changes})).to(dtype).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in parameter_name:
                parameter.mul_(4)
            elif "k_norm" in parameter_name:  # weights that are all alike would give every key the same norm
                parameter.add_(torch.rand_like(parameter))
    model.generation_config.eos_token_id = None  # random models stop by chance otherwise
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder with a byte tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!", pad_token="!", chat_template=TEMPLATE)
    wrapped.save_pretrained(path)
    make_model("llama", vocab_size=256, max_position_embeddings=4096).float().save_pretrained(path)
    return str(path)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """A command line: its status, and what it wrote to standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["keepkv", *args])
    with pytest.raises(SystemExit) as stop:
        app.main()
    shown = capsys.readouterr()
    return int(stop.value.code or 0), shown.out, shown.err
