"""Triton's interpreter, mended where Triton 3.6 and NumPy 2.4 do not fit."""

from __future__ import annotations

from typing import Any


def patched() -> Any:
    """The interpreter's patch of tensors with one more: loop bounds that are loaded are arrays of one element, not numbers."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def more(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return more
