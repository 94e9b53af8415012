"""What keepkv has to know about a transformers model: which layers it can compress, and its rotary frequencies."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from keepkv.errors import ModelError

FAMILIES = ("gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")  # tested; all rotate half and half


def check(model: PreTrainedModel) -> None:
    """Raises ModelError unless the model's family is supported and it runs `sdpa` attention."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type not in FAMILIES:
        raise ModelError(f"the model family {config.model_type!r} is not supported: expected one of {', '.join(FAMILIES)}")
    if config._attn_implementation != "sdpa":
        raise ModelError(
            f"the model runs {config._attn_implementation!r} attention, keepkv needs 'sdpa': "
            "load it with attn_implementation='sdpa' or call model.set_attn_implementation('sdpa')"
        )


def layer_kinds(model: PreTrainedModel) -> list[CacheLayerMixin | None]:
    """Per layer None for full attention, or the stock cache layer of a sliding window, which is left as it is.

    Raises ModelError for any other kind of layer and for a model without full attention.
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
    """KV heads of a layer, and the size of a key."""
    config = model.config.get_text_config(decoder=True)
    heads, size = config.num_key_value_heads, getattr(config, "head_dim", None)
    return int(heads), int(size or config.hidden_size // config.num_attention_heads)


def let_go(layer: CacheLayerMixin) -> None:
    """Frees what a sliding window has passed: transformers' layers keep views that hold all keys of a forward pass."""
    for name in ("keys", "values"):
        kept = getattr(layer, name)
        if kept.untyped_storage().nbytes() > 2 * kept.numel() * kept.element_size():
            setattr(layer, name, kept.clone())


def rotary(model: PreTrainedModel) -> nn.Module:
    """The module that holds the rotary frequencies. Raises ModelError if there is none."""
    module = getattr(model.get_decoder(), "rotary_emb", None)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{type(model).__name__} has no rotary position embedding where one was expected (rotary_emb)")
    return module


def projections(model: PreTrainedModel) -> list[Tensor | None]:
    """Per layer with full attention its output projection [D, heads × d_v], or None where its weights are not to be read."""
    found = []
    for index, kind in enumerate(layer_kinds(model)):
        weight = getattr(getattr(model.get_decoder().layers[index].self_attn, "o_proj", None), "weight", None)
        if kind is None:
            found.append(weight.detach() if isinstance(weight, Tensor) and weight.is_floating_point() else None)
    return found


def frequencies(rotary_module: nn.Module) -> Tensor:
    """Rotary frequencies of the full-attention layers, float32 [r/2], as they are now (some models change them)."""
    named = dict(rotary_module.named_buffers())
    return named.get("full_attention_inv_freq", named.get("inv_freq", Tensor())).detach().float()


def local_frequencies(rotary_module: nn.Module) -> Tensor:
    """Rotary frequencies of the sliding-window layers, float32 [r/2]: their own where they have some."""
    named = dict(rotary_module.named_buffers())
    own = named.get("sliding_attention_inv_freq")
    return frequencies(rotary_module) if own is None else own.detach().float()


def trained_length(model: PreTrainedModel) -> int | None:
    """How many tokens the model was trained for, where its configuration says so."""
    length: Any = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def too_long(model: PreTrainedModel, tokens: int) -> str:
    """A warning where a model is asked for more tokens than it was trained for; nothing otherwise."""
    trained = trained_length(model)
    if trained is None or tokens <= trained:
        return ""
    return (
        f"{tokens:,} tokens, but the model was trained for {trained:,}: "
        "beyond that its answers get worse with the full cache too"
    )
