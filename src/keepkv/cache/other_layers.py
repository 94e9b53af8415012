"""Layers beside the compressed ones: transformers' own, exact, and of a size that does not grow with the text.

    sliding windows, chunks                  keys and values of the newest tokens
    linear attention, Mamba, convolutions    a state that every token changes
    layers that use another layer's keys     nothing

A model may write to a state in place. So a fork has its own, while keys and values, which are only ever replaced, are shared.
What a state was before a token cannot be told from what it is after it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from keepkv.errors import KeepKVError

_STATES = ("conv_states", "recurrent_states")  # attributes of transformers' layers: for every number of a state its tensor
_FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")


def has_window(layer: Any) -> bool:
    """Whether a layer holds the keys and values of the newest tokens."""
    return hasattr(layer, "sliding_window")


def has_state(layer: Any) -> bool:
    """Whether a layer holds a state that every token changes."""
    return hasattr(layer, _STATES[0])


def state_tensors(layer: Any) -> Iterator[tuple[str, int, Tensor]]:
    """All states that a layer holds: which of `_STATES` it is, its number, and the tensor [B, ...]."""
    if has_state(layer):
        for name in _STATES:
            for number, tensor in getattr(layer, name).items():
                if tensor is not None:
                    yield name, number, tensor


def tensors(layer: Any) -> list[Tensor]:
    """All that a layer holds."""
    windows = [getattr(layer, name, None) for name in ("keys", "values")]
    return [*(x for x in windows if x is not None), *(state for _, _, state in state_tensors(layer))]


def forked(layer: Any) -> Any:
    """A second layer that goes on from here on its own."""
    twin = copy.copy(layer)
    if has_state(layer):
        for name in _FLAGS:
            setattr(twin, name, dict(getattr(layer, name)))
        for name in _STATES:
            own = {number: None if x is None else x.clone() for number, x in getattr(layer, name).items()}
            setattr(twin, name, own)
    return twin


def moved(layer: Any, device: torch.device) -> None:
    """Takes all that a layer holds to a device."""
    for name in ("keys", "values"):
        if isinstance(x := getattr(layer, name, None), Tensor):
            setattr(layer, name, x.to(device))
    for name, number, state in list(state_tensors(layer)):
        getattr(layer, name)[number] = state.to(device)
        layer.device = device


def free_passed(layer: Any) -> None:
    """Frees the tokens that a sliding window has passed: transformers' layers keep views, which hold a whole pass's keys."""
    for name in ("keys", "values"):
        view = getattr(layer, name)
        if view.untyped_storage().nbytes() > 2 * view.numel() * view.element_size():
            setattr(layer, name, view.clone())


def check_crop(index: int, layer: Any, tokens_to_remove: int) -> None:
    """Raises KeepKVError unless a layer can forget its newest -tokens_to_remove tokens, exactly."""
    recording = getattr(layer, "record_past", False)
    if has_state(layer) and not (recording and layer.is_croppable):
        raise KeepKVError(
            f"crop({tokens_to_remove}): layer {index} has a state that every token changes (linear attention, Mamba, a "
            "convolution), and what it was before cannot be told from it: fork() before reading what may have to be forgotten"
        )
    if has_window(layer) and layer.cumulative_length >= layer.sliding_window and not recording:
        raise KeepKVError(
            f"crop({tokens_to_remove}): the sliding window of layer {index} has moved on, and what it passed is gone: fork() "
            "before reading what may have to be forgotten, or call activate_past_recording() before it moves on"
        )


def fill_state(layer: Any, states: Mapping[str, Tensor], read: Sequence[bool]) -> None:
    """Gives a new layer copies of the states of a saved one.

    Args:
        layer: A layer that has read nothing.
        states: By name and number, "conv_states.0".
        read: For every number, whether tokens had been read into it (`has_previous_state`).

    Raises:
        ValueError: for states that such a layer does not have.
    """
    setters = {_STATES[0]: layer.update_conv_state, _STATES[1]: layer.update_recurrent_state}
    for name, state in states.items():
        kind, _, number = name.partition(".")
        if kind not in setters or int(number) not in range(layer.number_of_states):
            raise ValueError(f"a layer has no {name}")
        setters[kind](state, int(number))
    if len(read) != layer.number_of_states:
        raise ValueError(f"a layer has {layer.number_of_states} states, not {len(read)}")
    layer.has_previous_state.update(enumerate(read))
