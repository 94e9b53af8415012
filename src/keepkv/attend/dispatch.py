"""Attention over slots with votes and a tail of newer tokens, by one of several backends.

| backend | where | how |
|---|---|---|
| eager | everywhere, float64 too | plain softmax in float32 or better, head by head: `states.block` |
| sdpa | CPU, below float64, d = d_v | PyTorch's flash attention kernel, votes as its mask; matrix products for few rows |
| triton | CUDA, below float64, sizes to 256 | `triton_kernels`: split over the keys, a group's heads together; slots only |
| bias_in_keys | CPU, CUDA in 16 bits | stock flash attention over slots with their votes in their keys (`widen`); slots only |

"auto" takes `bias_in_keys` for slots that `bias_in_keys.widen` made, and otherwise what `backend_for` names. A fast kernel has
been tried once against `states.exact` where it runs. If it refuses, "auto" is `eager`, and a warning says why. A backend that
is asked for by name and cannot run raises BackendError.

Capped logits are for `eager` alone, and "auto" takes it for them: no kernel here caps. Sinks are joined to what any backend
computed.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from keepkv.attend import bias_in_keys, eager, sdpa
from keepkv.attend.states import AttentionState, block, merge_states, with_sinks
from keepkv.errors import BackendError, nearest
from keepkv.ops.dtypes import wide
from keepkv.ops.ragged import groups
from keepkv.ops.softmax import PLAIN, Softmax
from keepkv.slots.slots import Slots

_BACKENDS = (
    "eager",
    "sdpa",
    "bias_in_keys",
    "triton",
)  # each a module of this folder that has what BackendModule says

_TILE = 1 << 24  # logits held at once


class BackendModule(Protocol):
    """What the module of a backend has. It is imported when it is first asked for."""

    def reason_against(self, device: torch.device, dtype: torch.dtype, size: int, value_size: int) -> str:
        """Why it cannot run queries of `size` over values of `value_size`, as the end of a sentence; "" if it can."""

    def attend_slots(self, query: Tensor, slots: Slots, scale: float) -> AttentionState:
        """See `attend_slots` of this module. `slots.read()` has plain tensors, however the slots are stored."""


class Backend(NamedTuple):
    """The backend that "auto" takes.

    Attributes:
        name: Its name.
        refusal: Why it is not the fast one of the device; "" where it is.
    """

    name: str
    refusal: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.refusal})" if self.refusal else self.name


@cache
def backend_for(device: torch.device, dtype: torch.dtype, size: int, value_size: int | None = None) -> Backend:
    """The backend that "auto" takes. Where the device's fast backend refuses, a warning says so once, but not for float64.

    Args:
        device: Where queries and slots are.
        dtype: Of the queries.
        size: d, of queries and keys.
        value_size: d_v. None: as large.
    """
    fast = "triton" if device.type == "cuda" else "sdpa"
    reason = _module(fast).reason_against(device, dtype, size, size if value_size is None else value_size)
    if not reason:
        return Backend(fast)
    if dtype != torch.float64:
        warnings.warn(
            f"attention over compressed slots runs on the slow backend 'eager': the attention backend {fast!r} {reason}",
            stacklevel=2,
        )
    return Backend("eager", f"{fast} {reason}")


def attend(
    query: Tensor,
    slots: Slots,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    scale: float,
    backend: str = "auto",
    softmax: Softmax = PLAIN,
) -> Tensor:
    """o = softmax(scale q·k + b) v over slots and tail together. `docs/theory.md 1.1`.

    Kernels have no gradient of the log-sum-exp: where gradients are asked for, "auto" is `eager`.

    Args:
        query: [B, H, R, d], the R = G × new rows of the query heads that share a KV head.
        slots: One layer's, as they are stored.
        keys: [B, H, n, d], of the tail.
        values: [B, H, n, d_v].
        visible: What of the tail each row sees, see `attend_tail`.
        scale: The factor on q·k.
        backend: A name from the table above, or "auto".
        softmax: The layer's cap and sinks.

    Returns:
        [B, H, R, d_v], float32 or better.

    Raises:
        BackendError: for a backend that is unknown or cannot run.
    """
    if backend == "auto" and torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys, values)):
        backend = "eager"
    if backend == "auto" and isinstance(slots.keys, bias_in_keys.BiasInKeys):
        backend = "bias_in_keys"
    backend = _backend(backend, query, slots.values.shape[1], softmax)
    sinks = softmax.of_rows(query.shape[1], query.shape[2])
    if backend == "sdpa" and query.shape[2] <= sdpa.FEW:
        return sdpa.attend_few(query, slots, keys, values, visible, scale, sinks)
    compact = attend_slots(query, slots, scale, backend, softmax)
    tail = attend_tail(query, keys, values, visible, scale, backend, softmax)
    return with_sinks(merge_states(compact, tail), sinks)


def attend_slots(query: Tensor, slots: Slots, scale: float, backend: str = "auto", softmax: Softmax = PLAIN) -> AttentionState:
    """Attention over the slots alone: o = softmax(scale q·k + b) v and its log-sum-exp. Every row sees all slots of its head.

    Args:
        query: [B, H, R, d], the R = G × new rows of the query heads that share a KV head.
        slots: One layer's, as they are stored. They are ragged, and nothing is padded.
        scale: The factor on q·k.
        backend: A name from the table above, or "auto".
        softmax: The layer's cap. Its sinks belong to the whole and are not looked at.

    Returns:
        Output [B, H, R, d_v] and log-sum-exp [B, H, R], float32 or better; 0 and -inf for a head without slots.

    Raises:
        BackendError: for a backend that is unknown or cannot run.
    """
    backend = _backend(backend, query, slots.values.shape[1], softmax)
    if backend == "eager":
        return eager.attend_slots(query, slots, scale, softmax)
    return _module(backend).attend_slots(query, slots, scale)


def attend_tail(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    scale: float,
    backend: str = "auto",
    softmax: Softmax = PLAIN,
) -> AttentionState:
    """Attention over the tail alone: o = softmax(scale q·k + mask) v and its log-sum-exp.

    `triton`, and `bias_in_keys` on CUDA, run the plain code here.

    Args:
        query: [B, H, G × new, d].
        keys: [B, H, n, d].
        values: [B, H, n, d_v].
        visible: [B or 1, 1, new, n], bool or additive, the same for the G query heads of a group; None where all is seen.
        scale: The factor on q·k.
        backend: A name from the table above, or "auto".
        softmax: As in `attend_slots`.

    Returns:
        Output [B, H, G × new, d_v] and log-sum-exp [B, H, G × new]; 0 and -inf for a row that sees nothing.

    Raises:
        BackendError: for a backend that is unknown or cannot run.
    """
    backend = _backend(backend, query, values.shape[-1], softmax)
    if backend == "sdpa" or (backend == "bias_in_keys" and query.device.type == "cpu"):
        return sdpa.attend_tail(query, keys, values, visible, scale)
    batch, heads, rows, size = query.shape
    apart = query.reshape(batch, heads, -1, rows if visible is None else visible.shape[2], size)  # [B, H, G, new, d]
    step = max(1, _TILE // max(1, apart.shape[:3].numel() * keys.shape[2]))
    states = []
    for lo in range(0, apart.shape[3], step):
        bias = None if visible is None else sdpa.additive(visible[:, :, None, lo : lo + step], wide(query.dtype))
        states.append(block(apart[:, :, :, lo : lo + step], keys[:, :, None], values[:, :, None], bias, scale, softmax))
    output, log_mass = (torch.cat(tensors, 3).flatten(2, 3) for tensors in zip(*states, strict=True))
    return output, log_mass


def attend_watched(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    answered: int,
    softmax: Softmax = PLAIN,
    sinks: Tensor | None = None,
) -> tuple[AttentionState, Tensor]:
    """Attention of reference rows, and the share that they pay each entry. Everything in the queries' dtype.

    Args:
        query: [H, R, d], scaled.
        keys: [H, T, d], all visible.
        values: [H, T, d_v].
        bias: [H, T], added to the logits; or None.
        answered: Only the first `answered` rows get an output.
        softmax: The layer's cap.
        sinks: [H, R], the logit of each row's sink, which counts in the log-sum-exp here; or None.

    Returns:
        The state of these rows, and the root mean square over all R rows of each entry's softmax share, [H, T].
    """
    heads, rows, _ = query.shape
    entries = keys.shape[1]
    output = query.new_empty(heads, answered, values.shape[2])
    log_mass = query.new_empty(heads, rows)
    squares = query.new_zeros(heads, entries)
    for some in groups(heads, query.device, entries):
        own, own_keys, own_values = query[some], keys[some].mT, values[some]
        step = min(rows, max(1, _tile(query.device) // (len(own) * entries)))
        tile = query.new_empty(len(own) * step * entries)  # the shares of one step, in place
        for lo in range(0, rows, step):
            queries = own[:, lo : lo + step]
            share = tile[: queries.shape[:2].numel() * entries].view(*queries.shape[:2], entries)
            torch.bmm(queries, own_keys, out=share)
            if softmax.cap is not None:
                share.copy_(softmax.capped(share))
            if bias is not None:
                share.add_(bias[some, None])
            top = share.amax(-1)
            if sinks is not None:
                sunk = sinks[some, lo : lo + step].to(top)
                top = torch.maximum(top, sunk)
            total = share.sub_(top[..., None]).exp_().sum(-1)
            if sinks is not None:
                total += (sunk - top).exp_()
            share.mul_(total.reciprocal()[..., None])
            log_mass[some, lo : lo + step] = top + total.log()
            if lo < answered:
                output[some, lo : lo + step] = torch.bmm(share[:, : answered - lo], own_values)
            squares[some] += share.square_().sum(1)
    return (output, log_mass[:, :answered]), (squares / rows).sqrt_()


def _tile(device: torch.device) -> int:
    """Shares held at once: what stays in a CPU's cache, or is worth a launch."""
    return 1 << 21 if device.type == "cpu" else 1 << 27


@cache
def _module(name: str) -> BackendModule:
    """The module of a backend."""
    return cast(BackendModule, import_module(f"keepkv.attend.{name}"))


def _backend(name: str, query: Tensor, value_size: int, softmax: Softmax = PLAIN) -> str:
    """The backend to use: the one that was asked for, or what "auto" stands for. Raises BackendError."""
    sizes = (query.shape[-1], value_size)
    if name == "auto":
        return "eager" if softmax.cap is not None else backend_for(query.device, query.dtype, *sizes).name
    if name not in _BACKENDS:
        raise BackendError(f"unknown attention backend {name!r}: {nearest(name, ['auto', *_BACKENDS])}")
    if reason := _module(name).reason_against(query.device, query.dtype, *sizes):
        raise BackendError(f"the attention backend {name!r} {reason}: backend='auto' takes one that can")
    if softmax.cap is not None and name != "eager":
        raise BackendError(f"the attention backend {name!r} does not cap logits, as this model does: 'eager' can")
    return name
