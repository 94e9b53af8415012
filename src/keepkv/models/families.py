"""What keepkv must know about a model of transformers: whether it can be supported, its layers, and the shape of its keys.

No family is known by name. `check_supported` looks for what can be seen without running the model, and the first cache for a
model tries the rest (`keepkv.cache.self_check`). Which of transformers' models pass is listed in docs/models.md.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from keepkv.errors import ModelError
from keepkv.models.rotation import attention_modules


def check_supported(model: PreTrainedModel) -> None:
    """Checks what can be seen of a model without running it, before anything is read.

    Raises:
        ModelError: unless the model is a decoder that runs `sdpa` attention, keeps keys and values of full attention or of
            sliding windows in every layer, and rotates them with their position.
    """
    config = model.config.get_text_config(decoder=True)
    name = config.model_type
    if model.config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder with a decoder, keepkv needs a decoder alone")
    if config._attn_implementation != "sdpa":
        way = (
            "load it with attn_implementation='sdpa' or call model.set_attn_implementation('sdpa')"
            if getattr(model, "_supports_sdpa", False)
            else f"transformers has no 'sdpa' attention for {name}, use it with transformers' own cache"
        )
        raise ModelError(f"the model runs {config._attn_implementation!r} attention, keepkv needs 'sdpa': {way}")
    layer_kinds(model)
    key_shape(model)
    if not attention_modules(model):
        raise ModelError(
            f"{name} does not rotate its keys with their position (rotary positions), so keepkv could not move queries: use it "
            "with transformers' own cache"
        )


def layer_kinds(model: PreTrainedModel) -> list[CacheLayerMixin | None]:
    """Per layer None for full attention, or transformers' own cache layer for a sliding window, which is not compressed.

    Raises:
        ModelError: for any other kind of layer, and for a model without full attention in any layer.
    """
    kinds: list[CacheLayerMixin | None] = []
    for index, layer in enumerate(DynamicCache(config=model.config.get_text_config(decoder=True)).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelError(
                f"layer {index} keeps {_kept(layer)}: keepkv compresses keys and values of full attention, and passes over "
                "sliding windows; use the model with transformers' own cache"
            )
        kinds.append(layer if isinstance(layer, DynamicSlidingWindowLayer) else None)
    if None not in kinds:
        raise ModelError("every layer of this model has a sliding window: its cache is bounded and nothing can be compressed")
    return kinds


def _kept(layer: object) -> str:
    """What a layer of transformers' cache keeps that is neither full attention nor a sliding window."""
    name = type(layer).__name__
    if "Linear" in name:
        return f"a state that every token changes ({name}: linear attention, Mamba, a convolution)"
    if "Dummy" in name:
        return f"nothing of its own ({name}: it uses another layer's keys)"
    return f"more than keys and values ({name}: an indexer that picks tokens, perhaps)"


def key_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Number of KV heads of a layer, and the size d of a key. Raises ModelError where layers differ in them."""
    config = model.config.get_text_config(decoder=True)
    try:
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    except (AttributeError, RuntimeError) as error:  # a configuration by layer refuses to name one number for all
        raise ModelError(
            "the layers of this model have keys of different sizes or numbers of heads, keepkv needs the same in all: use the "
            "model with transformers' own cache"
        ) from error
    return int(heads), int(size)


def free_passed(layer: CacheLayerMixin) -> None:
    """Frees the tokens that a sliding window has passed: transformers' layers keep views, which hold a whole pass's keys."""
    for name in ("keys", "values"):
        view = getattr(layer, name)
        if view.untyped_storage().nbytes() > 2 * view.numel() * view.element_size():
            setattr(layer, name, view.clone())


def projections(model: PreTrainedModel) -> list[Tensor | None]:
    """Per layer with full attention its output projection [D, heads × d_v], or None where its weights cannot be read.

    They cannot be read, for example, where they are quantized, also to float8, where they are not in memory (offloaded to the
    meta device), or where they are not called `o_proj`.
    """
    attention = attention_modules(model)
    kinds = layer_kinds(model)
    if len(attention) != len(kinds):  # layers that are run through more than once
        return [None] * kinds.count(None)
    weights = []
    for index, kind in enumerate(kinds):
        if kind is not None:
            continue
        weight = getattr(getattr(attention.get(index), "o_proj", None), "weight", None)
        weights.append(weight.detach() if isinstance(weight, Tensor) and _is_readable(weight) else None)
    return weights


def _is_readable(weight: Tensor) -> bool:
    """Whether a weight's numbers are there, and are what the model multiplies with."""
    return weight.is_floating_point() and weight.element_size() > 1 and not weight.is_meta


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
