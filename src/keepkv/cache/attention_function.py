"""keepkv's attention function, for models that do not run `sdpa`: transformers has none for them, or they were told otherwise.

transformers looks a model's attention function up by name (`AttentionInterface`), and the one that makes its masks as well
(`AttentionMaskInterface`). These are its own doors for other functions. `lead_to_caches` registers one name for each way of
attending, and tells a model's text configuration to use it. It is called when a cache is made, not on import.

The function does what the model did before: the same `eager` function of the model's own file, or `flex_attention`, with the
same masks. Only where the keys are a cache's proxies (proxies.py) does it lead to that cache, with what the model hands to its
function beside queries and mask: sinks (`s_aux`) and a cap of the logits (`softcap`). So a model goes on with any other cache,
or none, as if nothing had happened.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from keepkv.cache.proxies import Call, Proxy, own_bias
from keepkv.errors import ModelError
from keepkv.models import families
from keepkv.ops.softmax import Softmax

OURS = {"eager": "keepkv_eager", "flex_attention": "keepkv_flex_attention"}  # what a model ran, and then runs
SDPA = "sdpa"  # needs nothing: PyTorch itself leads to the proxies


def lead_to_caches(model: PreTrainedModel) -> None:
    """Has a model call keepkv's function in place of its own, unless it runs `sdpa`. Changes nothing for other caches.

    Raises:
        ModelError: for attention that keepkv's function cannot stand in for.
    """
    config = model.config.get_text_config(decoder=True)
    way = config._attn_implementation
    if way == SDPA or way in OURS.values():
        return
    if way not in OURS:
        raise ModelError(
            f"the model runs {way!r} attention, keepkv works with {SDPA!r}, {' and '.join(map(repr, OURS))}: "
            "model.set_attn_implementation('sdpa')"
        )
    if not any(_eager_function(module) for module in model.get_decoder().modules()):
        raise ModelError(
            f"{config.model_type} computes attention in its own way and not through transformers' attention interface, so "
            "keepkv would not see its queries: use it with transformers' own cache"
        )
    if way == "flex_attention" and any(getattr(kind, "users", 1) > 1 for kind in families.layer_kinds(model)):
        raise ModelError(
            "this model's layers share keys, and its code cuts masks by the way of attending, which it cannot do with those of "
            "'flex_attention': model.set_attn_implementation('sdpa')"
        )
    AttentionInterface.register(OURS[way], partial(_attention, way))
    AttentionMaskInterface.register(OURS[way], ALL_MASK_ATTENTION_FUNCTIONS[way])
    config._attn_implementation = OURS[way]


def leave(model: PreTrainedModel) -> None:
    """Has a model run again what it ran before `lead_to_caches`."""
    config = model.config.get_text_config(decoder=True)
    before = {ours: theirs for theirs, ours in OURS.items()}
    config._attn_implementation = before.get(config._attn_implementation, config._attn_implementation)


def _attention(
    way: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a model calls, see `transformers.AttentionInterface`. way: what it ran before."""
    eager = _eager_function(module)
    assert eager is not None, "lead_to_caches looks for it"
    function = eager if way == "eager" else ALL_ATTENTION_FUNCTIONS[way]
    given = {"dropout": dropout, "softcap": softcap, "s_aux": s_aux}
    more |= {name: value for name, value in given.items() if value is not None}
    if not isinstance(key, Proxy):
        return _called(function, module, query, key, value, attention_mask, scaling, more)
    if more.get("position_bias") is not None:
        raise own_bias()
    weights: list[Tensor | None] = []

    def stock(keys: Tensor, values: Tensor) -> Tensor:
        output, shares = _called(function, module, query, keys, values, attention_mask, scaling, more)
        weights.append(shares)
        return output.transpose(1, 2)

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = attention_mask
    if isinstance(mask, BlockMask):
        mask = create_mask(mask.mask_mod, mask.shape[0], 1, query.shape[2], mask.shape[-1], device=query.device)
    output = key.attend(Call(query, mask, scale, dropout if module.training else 0.0, Softmax(softcap, s_aux), stock))
    return output.transpose(1, 2).contiguous(), next(iter(weights), None)


def _called(
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None,
    more: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The function of transformers. It returns the output [B, new, H × G, d_v], and shares or None."""
    result: tuple[Tensor, Tensor | None] = function(module, query, key, value, mask, scaling=scaling, **more)
    return result


def _eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """The `eager` attention function of a module's own file: what it hands to `AttentionInterface.get_interface`; or None."""
    forward = inspect.unwrap(type(module).forward)
    if "ALL_ATTENTION_FUNCTIONS" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    function: Callable[..., Any] | None = forward.__globals__.get("eager_attention_forward")
    return function
