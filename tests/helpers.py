"""Tiny random models of every supported family, built here: nothing is downloaded. And what several test files use."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv import KeepCache, Method, score
from keepkv.cli import app
from keepkv.ops.rope import Rotation
from keepkv.recipe import CONVERSATION
from keepkv.text.conversation import Conversation
from keepkv.types import Observation

ROOT = Path(__file__).parent.parent
LOG = ROOT / "examples" / "expedition-log.txt"
FOX = "The quick brown fox jumps over the lazy dog, and the dog looks at the fox without getting up. "
TABLE = "5.23.0"  # the transformers whose types docs/models.md lists
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
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
    model: PreTrainedModel = model_class(config_class(**{**SIZES, **extra, **changes})).to(dtype).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in parameter_name:
                parameter.mul_(4)
            elif "k_norm" in parameter_name:  # weights that are all alike would give every key the same norm
                parameter.add_(torch.rand_like(parameter))
    model.generation_config.eos_token_id = None  # random models stop by chance otherwise
    return model


def small_model(kind: str, dtype: torch.dtype = torch.float64, **changes: object) -> PreTrainedModel:
    """A tiny random model of any type of transformers, as benchmarks/model_table.py builds it.

    Skips the test on older transformers than the table's: types come, and change what they are refused for.
    """
    if Version(transformers.__version__) < Version(TABLE):
        pytest.skip(f"types other than the tried families are tested with transformers {TABLE} and newer")
    build = runpy.run_path(str(ROOT / "benchmarks" / "model_table.py"))["build"]
    model: PreTrainedModel = build(kind, dtype, **changes)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randn64(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clustered(seed: int, tokens: int = 60, size: int = 16) -> tuple[Tensor, Tensor]:
    """Keys in a few tight groups, so that many pass the similarity threshold."""
    centers = randn64(6, size, seed=seed)
    return centers[torch.arange(tokens) % 6] + 0.15 * randn64(tokens, size, seed=seed + 1), randn64(tokens, 8, seed=seed + 2)


def observation(tokens_read: int = 50, queries: int | None = None, **more: Any) -> Observation:
    """A layer as the scores see it: two KV heads of three query heads each, head size 16."""
    count = queries or tokens_read
    positions = torch.arange(tokens_read - count, tokens_read)
    rotation = Rotation.halves(1 / 100 ** (torch.arange(8) / 8))
    return Observation(
        randn(2, tokens_read, 16), randn(2, tokens_read, 16, seed=1), randn(2, 3, count, 16, seed=2), positions, rotation,
        0.25, **more,
    )  # fmt: skip


# a method that keeps every entry, so that any number of folds loses nothing
EVERYTHING = Method("everything", "", "", score.recency, lambda s, n: (~s.isneginf()).sum(-1).tolist())


def read(model: PreTrainedModel, ids: Tensor, **options: Any) -> KeepCache:
    """A cache that has read a text, and repeated it where the method must."""
    cache = KeepCache(model, **options)
    if cache.policy.method.repeat is not None and cache.policy.method.repeat.needed:
        return cache.read(model, ids)
    model(ids, past_key_values=cache)
    return cache


def stored(cache: KeepCache) -> int:
    """Bytes of every storage that hangs on the cache, found without the cache's own help."""
    seen = {}
    for layer in cache.layers:
        slots = getattr(layer, "slots", None)
        quantized = [stack for stack in (slots.keys, slots.values) if not isinstance(stack, Tensor)] if slots else []
        for tensor in [each for holder in (layer, slots, *quantized) if holder for each in vars(holder).values()]:
            if isinstance(tensor, Tensor) and tensor.ndim:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())


def converse(model_and_tokenizer: tuple[PreTrainedModel, PreTrainedTokenizerBase], **options: Any) -> Conversation:
    """A conversation in the memory of 40 tokens, folded every 24."""
    system = options.pop("system", "")
    return Conversation(*model_and_tokenizer, replace(CONVERSATION, **{"budget": "40", "period": 24, **options}), system)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """A command line: its status, and what it wrote to standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["keepkv", *args])
    with pytest.raises(SystemExit) as stop:
        app.main()
    shown = capsys.readouterr()
    return int(stop.value.code or 0), shown.out, shown.err


VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are closed in order; collects attributes and the words between the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
