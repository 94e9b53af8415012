"""SDPA proxies: how a cache sees a model's queries without changing the model.

transformers calls `cache.update(keys, values)` in every attention module and hands what comes back to PyTorch's
`scaled_dot_product_attention`, together with the queries. A cache is never shown the queries. A compressed cache needs them
twice: to attend to slots, whose votes are a bias in the logits, and to observe what the model looks for.

So `update` returns two proxies in place of keys and values. A proxy has the shape, dtype and device that keys (or values) of
all tokens would have, and takes no memory. When the attention module asks PyTorch for scaled dot product attention over it,
PyTorch's override protocol (`__torch_function__`) calls the function that the proxy carries, with the queries. No hook, no
patch and no registration is needed, and the model's own code runs as it is.

What a proxy does not stand for is refused with an error: eager attention and the like, which compute with keys themselves, and
torch.compile.
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
    """Stands for a layer's keys or values. `attend` takes what scaled_dot_product_attention takes, and is called instead."""

    attend: Attend

    @staticmethod
    def of(like: Tensor, tokens: int, attend: Attend) -> SdpaProxy:
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
            key = args[1] if len(args) > 1 else kwargs["key"]
            return key.attend(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result  # shape, dtype, device and the like
        if func in _RESHAPES:
            return _proxy(result, args[0].attend)
        raise ModelError(
            f"a KeepCache works with transformers' `sdpa` attention over the keys and values it was given, but the model's "
            f"attention calls {getattr(func, '__name__', func)} on them: model.set_attn_implementation('sdpa'), or, where it "
            "runs that already, transformers' own cache"
        )


def _proxy(tensor: Tensor, attend: Attend) -> SdpaProxy:
    proxy = tensor.as_subclass(SdpaProxy)
    proxy.attend = attend
    return proxy
