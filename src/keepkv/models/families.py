"""What keepkv must know about a model of transformers: whether it can be supported, its layers, and the shape of its keys.

No family is known by name. `check_supported` looks for what can be seen without running the model, and the first cache for a
model tries the rest (`keepkv.cache.self_check`). Which of transformers' models pass is listed in docs/models.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from keepkv.errors import ModelError
from keepkv.models.rotation import attention_modules


def check_supported(model: PreTrainedModel) -> None:
    """Checks what can be seen of a model without running it, before anything is read.

    Raises:
        ModelError: unless the model is a decoder that keeps keys and values of full attention in some layers, and in the
            others nothing that grows, and rotates them with their position, or knows the order of tokens by a state.
    """
    config = model.config.get_text_config(decoder=True)
    name = config.model_type
    if model.config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder with a decoder, keepkv needs a decoder alone")
    kinds = layer_kinds(model)
    key_shape(model)
    # A state knows the order of tokens without rotation.
    in_order = any(getattr(kind, "states", 0) or hasattr(kind, "conv_states") for kind in kinds)
    if not attention_modules(model) and not in_order:
        raise ModelError(
            f"{name} does not rotate its keys with their position (rotary positions), so keepkv could not move queries: use it "
            "with transformers' own cache"
        )


@dataclass(frozen=True)
class FullAttention:
    """A layer whose keys and values grow with the text: what is compressed.

    Attributes:
        users: How many layers attend to them: more than one where layers share keys.
        states: How many states the layer has beside them, which every token changes.
    """

    users: int = 1
    states: int = 0


def layer_kinds(model: PreTrainedModel) -> list[Any]:
    """Per layer `FullAttention`, or transformers' own cache layer for what is not compressed.

    These are sliding windows, states (linear attention, Mamba, convolutions), and layers that hold nothing.

    Raises:
        ModelError: for any other kind of layer, and for a model without full attention in any layer.
    """
    config = model.config.get_text_config(decoder=True)
    kinds: list[Any] = []
    layers = DynamicCache(config=config).layers
    users = _users(config, len(layers))
    for index, layer in enumerate(layers):
        name = type(layer).__name__
        if name not in (*_FULL, *_OTHERS):
            raise ModelError(
                f"layer {index} keeps more than keys and values ({name}: an indexer that picks tokens, perhaps): keepkv "
                "compresses keys and values of full attention, and passes over sliding windows and recurrent states; use the "
                "model with transformers' own cache"
            )
        full = FullAttention(len(users[index]), getattr(layer, "number_of_states", 0))
        kinds.append(full if name in _FULL else layer)
    if not any(map(is_compressed, kinds)):
        raise ModelError(
            "no layer of this model has full attention (sliding windows or recurrent states alone): its cache is bounded and "
            "nothing can be compressed"
        )
    return kinds


# Of transformers' cache layers, by name: older transformers have not all of them.
_FULL = ("DynamicLayer", "LinearAttentionAndFullAttentionLayer")
_OTHERS = (
    "DynamicSlidingWindowLayer", "LinearAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer", "DummyLayer",
)  # fmt: skip


def is_compressed(kind: Any) -> bool:
    """Whether a layer of this kind (`layer_kinds`) is compressed."""
    return isinstance(kind, FullAttention)


def _users(config: Any, layers: int) -> list[tuple[int, ...]]:
    """Which layers attend to each layer's keys: itself, and others where layers share keys; none where it uses another's.

    Layers that share keys are named by transformers (`kv_sharing_modes`): one stores them, later ones of its type use them.
    """
    modes = getattr(config, "kv_sharing_modes", None) or ()
    all_users: list[tuple[int, ...]] = [(index,) for index in range(layers)]
    source: dict[str, int] = {}
    for index, (mode, layer_type) in enumerate(zip(modes, getattr(config, "layer_types", None) or (), strict=False)):
        if mode == "store":
            source[layer_type] = index
        if mode == "reuse" and layer_type in source:
            all_users[source[layer_type]] += (index,)
            all_users[index] = ()
    return all_users


def key_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Number of KV heads of a layer that is compressed, and the size d of a key. Raises ModelError where they differ."""
    config = model.config.get_text_config(decoder=True)
    by_layer = getattr(config, "per_layer_config", None)
    try:
        shapes = {
            _shape_of(by_layer[index] if by_layer else config)
            for index, kind in enumerate(layer_kinds(model))
            if is_compressed(kind) and (not by_layer or index < len(by_layer))
        }
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ModelError(
            f"the configuration of {config.model_type} does not say how many KV heads of which size a layer has (it is not a "
            "model with attention, perhaps): use the model with transformers' own cache"
        ) from error
    if len(shapes) > 1:
        raise ModelError(
            "the layers with full attention have keys of different sizes or numbers of heads, keepkv needs the same in all: "
            "use the model with transformers' own cache"
        )
    return shapes.pop()


def _shape_of(config: Any) -> tuple[int, int]:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads), int(size)


def projections(model: PreTrainedModel) -> list[tuple[Tensor, ...] | None]:
    """Per layer with full attention the output projections [D, heads × d_v] of all layers that attend to its keys.

    Its own one is the first. None where they cannot be read: where weights are quantized, also to float8, are not in memory
    (offloaded to the meta device), or are not called `o_proj`.
    """
    kinds = layer_kinds(model)
    users = _users(model.config.get_text_config(decoder=True), len(kinds))
    weights: dict[int, Tensor | None] = {}
    for module in model.get_decoder().modules():
        index, weight = getattr(module, "layer_idx", None), getattr(getattr(module, "o_proj", None), "weight", None)
        if isinstance(index, int) and isinstance(weight, Tensor):
            weights.setdefault(index, weight.detach() if _is_readable(weight) else None)
    groups = [own for own, kind in zip(users, kinds, strict=True) if is_compressed(kind)]
    if any(index not in weights for own in groups for index in own):  # also of layers that are run through more than once
        return [None] * len(groups)
    of_groups = [tuple(weight for index in own if (weight := weights[index]) is not None) for own in groups]
    return [known if len(known) == len(own) else None for known, own in zip(of_groups, groups, strict=True)]


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
