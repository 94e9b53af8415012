"""Proxies: how a cache sees a model's queries without changing the model's code.

transformers calls `cache.update(keys, values)` in every attention module and hands what comes back to an attention function,
together with the queries. A cache is never shown the queries. A compressed cache needs them twice: to attend to slots, whose
votes are a bias in the logits, and to observe what the model looks for.

So `update` returns two proxies in place of keys and values. A proxy has the shape, dtype and device that keys (or values) of
all tokens would have, and takes no memory. It leads back to the cache in one of two ways:

* `sdpa`: transformers asks PyTorch for scaled dot product attention, and PyTorch's override protocol (`__torch_function__`)
  calls `attend` instead. No hook, no patch and no registration is needed.
* Where a model runs `eager` or `flex_attention`, its attention function is keepkv's (`attention_function.py`), which calls
  `attend` itself.

What a proxy does not stand for is refused with an error: whatever computes with keys in another way, and torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keepkv.errors import ModelError
from keepkv.ops.softmax import PLAIN, Softmax

_RESHAPES = (Tensor.expand, Tensor.reshape, Tensor.__getitem__)  # what transformers' repeat_kv does to keys and values


class Call(NamedTuple):
    """One call of a model's attention function.

    Attributes:
        query: [B, H × G, new, d], or as PyTorch was given it.
        mask: As transformers made it, for the tokens that are held one by one, bool or additive; or None.
        scale: The factor on q·k.
        dropout: Of the shares.
        softmax: The cap and sinks that the function was called with.
        stock: Keys and values of all tokens to the output [B, H × G, new, d_v], as the model would have computed it.
    """

    query: Tensor
    mask: Tensor | None
    scale: float
    dropout: float
    softmax: Softmax
    stock: Callable[[Tensor, Tensor], Tensor]


Attend = Callable[[Call], Tensor]


def own_bias() -> ModelError:
    """The error for a model whose heads have biases of their own in the logits, wherever it hands them over."""
    return ModelError(
        "the model adds a bias of its own to each head's logits (by position, perhaps), which keepkv does not know: use it "
        "with transformers' own cache"
    )


class Proxy(Tensor):
    """Stands for a layer's keys or values. `attend` is called in place of attention over it."""

    attend: Attend

    @staticmethod
    def of(like: Tensor, tokens: int, attend: Attend) -> Proxy:
        """A proxy of shape [B, H, tokens, d] where `like` is [B, H, n, d]: one number, expanded."""
        batch, heads, _, size = like.shape
        return _proxy(like.detach().new_empty(1).expand(batch, heads, tokens, size), attend)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by PyTorch for every operation on a proxy."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            raise ModelError(
                "torch.compile cannot trace attention over a KeepCache: compile other parts, for layer in "
                "model.model.layers: layer.mlp.compile()"
            )
        if func is scaled_dot_product_attention:
            return _sdpa(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result  # shape, dtype, device and the like
        if func in _RESHAPES:
            return _proxy(result, args[0].attend)
        raise ModelError(
            f"a KeepCache works with attention that transformers' attention interface hands the keys and values to that it was "
            f"given, but the model's attention calls {getattr(func, '__name__', func)} on them: make a new cache if the way "
            "in which the model attends was changed since, otherwise use the model with transformers' own cache"
        )


def _proxy(tensor: Tensor, attend: Attend) -> Proxy:
    proxy = tensor.as_subclass(Proxy)
    proxy.attend = attend
    return proxy


def _sdpa(
    query: Tensor,
    key: Proxy,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """In place of PyTorch's function, with its arguments."""

    def stock(keys: Tensor, values: Tensor) -> Tensor:
        group = key.shape[1] // keys.shape[1]
        if group > 1:  # transformers repeats the KV heads where there is a mask
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        return scaled_dot_product_attention(
            query, keys, values, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    scale_of_keys = query.shape[-1] ** -0.5 if scale is None else scale
    return key.attend(Call(query, attn_mask, scale_of_keys, dropout_p, PLAIN, stock))
