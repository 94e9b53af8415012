"""Proxies: tensors without content that an attention module carries from the cache to the attention call.

A proxy has the shape, dtype and device of all keys (or values) of a layer, as if nothing had been compressed, and
takes no memory. When PyTorch is asked for scaled dot product attention over it, PyTorch's override protocol
(`__torch_function__`) calls the function it carries instead. So the cache sees the queries, and the model's own
attention code runs unchanged: no hook, no patch, no registration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keepkv.errors import ModelError

Attend = Callable[..., Tensor]
_RESHAPES = (Tensor.expand, Tensor.reshape, Tensor.__getitem__)  # what transformers' repeat_kv does to keys and values


class SdpaProxy(Tensor):
    """See the module's text. attend(query, key, value, ...) takes what scaled_dot_product_attention takes."""

    attend: Attend

    @staticmethod
    def of(like: Tensor, tokens: int, attend: Attend) -> SdpaProxy:
        """A proxy for [B, H, tokens, d] where `like` is [B, H, any, d]."""
        batch, heads, _, size = like.shape
        return _carry(like.detach().new_empty(1).expand(batch, heads, tokens, size), attend)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            raise ModelError(
                "torch.compile cannot trace attention over a KeepCache: compile other parts, for layer in "
                "model.model.layers: layer.mlp.compile()"
            )
        if func is scaled_dot_product_attention:
            key = args[1] if len(args) > 1 else kwargs["key"]
            return key.attend(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result  # shape, dtype, device and the like
        if func in _RESHAPES:
            return _carry(result, args[0].attend)
        raise ModelError(
            f"a KeepCache works with transformers' `sdpa` attention, but the model's attention calls "
            f"{getattr(func, '__name__', func)} on the keys: model.set_attn_implementation('sdpa')"
        )


def _carry(tensor: Tensor, attend: Attend) -> SdpaProxy:
    stand = tensor.as_subclass(SdpaProxy)
    stand.attend = attend
    return stand
