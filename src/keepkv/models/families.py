"""What keepkv must know about a model of transformers: whether it is supported, its layers, and its rotary frequencies.

A new model family is one name in `FAMILIES`, and one in the tests' list of tiny models: every test of the cache then runs
with it. That is enough for a decoder whose layers run `sdpa` attention and rotate keys by halves (dimension i with i + d/2).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from keepkv.errors import ModelError

FAMILIES = ("gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")  # tested


def check_supported(model: PreTrainedModel) -> None:
    """Checks a model before anything is read.

    Raises:
        ModelError: unless the model's family is in `FAMILIES` and it runs `sdpa` attention.
    """
    config = model.config.get_text_config(decoder=True)
    if config.model_type not in FAMILIES:
        raise ModelError(f"the model family {config.model_type!r} is not supported: expected one of {', '.join(FAMILIES)}")
    if config._attn_implementation != "sdpa":
        raise ModelError(
            f"the model runs {config._attn_implementation!r} attention, keepkv needs 'sdpa': "
            "load it with attn_implementation='sdpa' or call model.set_attn_implementation('sdpa')"
        )


def layer_kinds(model: PreTrainedModel) -> list[CacheLayerMixin | None]:
    """Per layer None for full attention, or transformers' own cache layer for a sliding window, which is not compressed.

    Raises:
        ModelError: for any other kind of layer, and for a model without full attention in any layer.
    """
    kinds: list[CacheLayerMixin | None] = []
    for layer in DynamicCache(config=model.config.get_text_config(decoder=True)).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelError(f"{type(layer).__name__}: keepkv compresses full attention and passes over sliding windows only")
        kinds.append(layer if isinstance(layer, DynamicSlidingWindowLayer) else None)
    if None not in kinds:
        raise ModelError("every layer of this model has a sliding window: its cache is bounded and nothing can be compressed")
    return kinds


def key_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Number of KV heads of a layer, and the size d of a key."""
    config = model.config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_key_value_heads), int(size)


def free_passed(layer: CacheLayerMixin) -> None:
    """Frees the tokens that a sliding window has passed: transformers' layers keep views, which hold a whole pass's keys."""
    for name in ("keys", "values"):
        view = getattr(layer, name)
        if view.untyped_storage().nbytes() > 2 * view.numel() * view.element_size():
            setattr(layer, name, view.clone())


def rotary(model: PreTrainedModel) -> nn.Module:
    """The module that holds the rotary frequencies.

    Raises:
        ModelError: if the model has none where transformers' models have it.
    """
    module = getattr(model.get_decoder(), "rotary_emb", None)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{type(model).__name__} has no rotary position embedding where one was expected (rotary_emb)")
    return module


def projections(model: PreTrainedModel) -> list[Tensor | None]:
    """Per layer with full attention its output projection [D, heads × d_v], or None where its weights cannot be read.

    They cannot be read, for example, where they are quantized.
    """
    weights = []
    for layer, kind in zip(model.get_decoder().layers, layer_kinds(model), strict=True):
        if kind is not None:
            continue
        weight = getattr(getattr(layer.self_attn, "o_proj", None), "weight", None)
        weights.append(weight.detach() if isinstance(weight, Tensor) and weight.is_floating_point() else None)
    return weights


def inv_freq(rotary_module: nn.Module) -> Tensor:
    """Rotary frequencies of the full-attention layers, float32 [r/2], as they are now: some models change them while running.

    r is the number of rotated dimensions of a key. Frequency i rotates by position × inv_freq[i] radians.
    """
    buffers = dict(rotary_module.named_buffers())
    return buffers.get("full_attention_inv_freq", buffers.get("inv_freq", Tensor())).detach().float()


def sliding_inv_freq(rotary_module: nn.Module) -> Tensor:
    """Rotary frequencies of the sliding-window layers, float32 [r/2]: their own if they have some, else those of the others."""
    own = dict(rotary_module.named_buffers()).get("sliding_attention_inv_freq")
    return inv_freq(rotary_module) if own is None else own.detach().float()


def trained_length(model: PreTrainedModel) -> int | None:
    """How many tokens the model was trained for; None where its configuration does not say so."""
    length: Any = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def length_warning(model: PreTrainedModel, tokens: int) -> str:
    """A warning if a text has more tokens than the model was trained for, otherwise an empty string."""
    trained = trained_length(model)
    if trained is None or tokens <= trained:
        return ""
    return (
        f"{tokens:,} tokens, but the model was trained for {trained:,}: "
        "beyond that its answers get worse with the full cache too"
    )
