"""How a model rotates its keys, asked of the model: its own rotary module, and the function that its attention calls.

keepkv moves queries and keys to other positions (`docs/theory.md 1.6`). It does not know families by name. An attention module
names, in its forward, the function that rotates; the decoder holds the module that makes its angles. Both are called here with
unit vectors at position 0 and at a few powers of two. What comes out says which dimensions are a pair, and how fast each pair
turns. The result is a `Rotation`, a value without weights, which keepkv applies itself: in float64, and backwards too.

The frequencies are exact. An angle is known to about 1e-7, at a power of two n it gives the frequency to 1e-7/n, and a position
that is a power of two loses nothing in float32. So what is measured at 2^30 rounds to the very float32 that the model holds.

Some frequencies depend on the length of the text (rope types "dynamic" and "longrope"). They are then asked for as they are
for a text of a certain length: no position is asked for that the text does not have.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from keepkv.errors import ModelError
from keepkv.ops.rope import Rotation

_FARTHEST = 1 << 30  # the farthest position that a rotary module is asked for
_POWERS = (0, 10, 20)  # of two, before it: an angle at one says how often the pair has turned at the next
_ROUNDING = 1e-5  # of what a rotation in float32 leaves where nothing should be


@dataclass(frozen=True)
class Rotary:
    """One way in which a layer may rotate: a function of the model's code, and the module that it is used with.

    Args:
        function: What the attention module calls, such as apply_rotary_pos_emb.
        module: What makes its cosines and sines. It holds frequencies, and no weights.
        layer_type: What the module is asked with, where it has several sets of frequencies; or None.
        size: d, the size of a key.
        at_end: Whether what rotates are the last dimensions of a key; otherwise the first.
    """

    function: Callable[..., Any]
    module: nn.Module
    layer_type: str | None
    size: int
    at_end: bool = False

    def rotation(self, length: int | None = None) -> Rotation:
        """The rotation, for a text of so many tokens; None: of a model whose frequencies do not depend on that.

        Raises:
            ModelError: if the function does anything but rotate pairs of dimensions. That angles are in proportion to the
                position is not looked at here: the self-check compares with the model's own keys.
        """
        farthest = _FARTHEST if length is None else max(1, length - 1)
        positions = [*(1 << n for n in _POWERS if 1 << n < farthest), farthest]
        moves = self._moves([0, *positions])[1:]
        first, second = self._pairs(moves)
        frequencies = torch.zeros(len(range(self.size)[first]), dtype=torch.float64)
        for position, move in zip(positions, moves, strict=True):
            angle = torch.atan2(move[first, second].diagonal(), move[first, first].diagonal())
            turns = torch.round((frequencies * position - angle) / (2 * torch.pi))  # of which the angle does not tell
            frequencies = (angle + 2 * torch.pi * turns) / position
        if length is None:
            frequencies = frequencies.float().double()
        return Rotation(first, second, frequencies.to(self._device))

    @property
    def fixed(self) -> bool:
        """Whether the frequencies are the same for texts of every length."""
        other = Rotary(self.function, copy.deepcopy(self.module), self.layer_type, self.size, self.at_end)
        short, long = (other._embeddings([1, last])[..., :1, :] for last in (2, _FARTHEST))
        return torch.equal(short, long)

    @property
    def _device(self) -> torch.device:
        return next((buffer.device for buffer in self.module.buffers()), torch.device("cpu"))

    def _embeddings(self, positions: list[int]) -> Tensor:
        """All that the module returns for positions [P], one behind the other: [..., P, n]."""
        returned = self._ask(positions)
        return torch.cat([torch.view_as_real(x).flatten(-2) if x.is_complex() else x for x in returned], -1)

    def _ask(self, positions: list[int]) -> tuple[Tensor, ...]:
        """What the module returns for positions [P]: cosines and sines, each [..., P, n], or complex numbers."""
        x = torch.zeros(1, len(positions), 1, dtype=torch.float64, device=self._device)
        places = torch.tensor(positions, device=self._device)[None]
        more = {} if self.layer_type is None else {"layer_type": self.layer_type}
        problem: Exception | None = None
        for shaped in (places, places.expand(3, 1, -1)):  # the latter of time, height and width (M-RoPE): the same in a text
            try:
                returned = self.module(x, shaped, **more)
            except Exception as error:
                problem = problem or error
            else:
                return returned if isinstance(returned, tuple) else (returned,)
        asked = f" for {self.layer_type}" if self.layer_type else ""
        raise ModelError(f"{type(self.module).__name__} makes no angles of positions{asked}") from problem

    def _moves(self, positions: list[int]) -> list[Tensor]:
        """For every position the matrix [d, d], float64, that moves a row vector there from the first position."""
        embeddings = self._ask(positions)
        matrices = [self._matrix(tuple(x[..., n : n + 1, :] for x in embeddings)) for n in range(len(positions))]
        try:  # a scaling, or an order of dimensions that is the same at every position
            start = torch.linalg.inv(matrices[0])
        except RuntimeError as error:
            raise ModelError(f"{_name(self.function)} loses dimensions, which no rotation does") from error
        return [start @ matrix for matrix in matrices]

    def _matrix(self, embeddings: tuple[Tensor, ...]) -> Tensor:
        """What the function makes of the d unit vectors at one position, one in a row: [d, d] float64 on the CPU."""
        width = embeddings[0].shape[-1]
        for size in dict.fromkeys((self.size, width, 2 * width)):  # of the part of a key that the module hands over
            if size <= self.size and (rows := self._turned(size, embeddings)) is not None:
                whole = torch.eye(self.size, dtype=torch.float64)
                start = self.size - size if self.at_end else 0
                whole[start : start + size, start : start + size] = rows
                return whole
        name = _name(self.function)
        raise ModelError(f"{name} takes no vectors of {self.size} dimensions, and none of the {width} that rotate")

    def _turned(self, size: int, embeddings: tuple[Tensor, ...]) -> Tensor | None:
        """What the function makes of unit vectors of a size, [size, size]; None where they do not fit."""
        unit = torch.eye(size, dtype=torch.float64, device=self._device)[None, :, None]  # as many heads, one token each
        names = list(inspect.signature(self.function).parameters)
        vectors = next((n for n, name in enumerate(names) if name.startswith(("cos", "sin", "freq"))), 2)
        by_name = dict(zip(("cos", "sin"), embeddings, strict=False)) if {"cos", "sin"} <= set(names) else {}
        try:
            turned = self.function(*[unit] * vectors, **by_name) if by_name else self.function(*[unit] * vectors, *embeddings)
        except Exception:  # of another size or order of arguments
            return None
        turned = turned[0] if isinstance(turned, tuple) else turned
        return turned[0, :, 0].double().cpu() if turned.shape == unit.shape else None

    def _pairs(self, moves: list[Tensor]) -> tuple[slice, slice]:
        """The dimensions that turn, as two slices of the same length: a dimension and its partner. Raises ModelError."""
        farther = torch.stack(moves)
        apart = farther.abs().amax(0) > 0
        apart.fill_diagonal_(False)
        partner = torch.where(apart.any(1), apart.int().argmax(1), -1).tolist()
        pairs = [(a, b) for a, b in enumerate(partner) if a < b]
        first, second = (_as_slice([pair[n] for pair in pairs]) for n in (0, 1))
        lone = [a for a, b in enumerate(partner) if b >= 0 and partner[b] != a]
        kept = farther @ farther.mT - torch.eye(self.size, dtype=torch.float64)  # a rotation changes no length or angle
        if lone or bool((apart.sum(1) > 1).any()) or first is None or second is None or float(kept.abs().max()) > _ROUNDING:
            raise ModelError(f"{_name(self.function)} does more than to rotate pairs of the {self.size} dimensions")
        return first, second


class Rotaries:
    """How every layer of a model rotates; None stands for a layer that does not."""

    def __init__(self, layers: Sequence[Rotary | None]) -> None:
        self._layers = tuple(layers)

    @cached_property
    def fixed(self) -> bool:
        """Whether all frequencies are the same for texts of every length."""
        return all(rotary.fixed for rotary in set(self._layers) if rotary is not None)

    def at(self, length: int) -> list[Rotation]:
        """Every layer's rotation in a text of so many tokens. A list of its own, but what is fixed is asked for once."""
        return list(self._fixed) if self.fixed else self._of(length)

    @cached_property
    def _fixed(self) -> list[Rotation]:
        return self._of(None)

    def _of(self, length: int | None) -> list[Rotation]:
        known = {rotary: rotary.rotation(length) for rotary in set(self._layers) if rotary is not None}
        return [Rotation.none() if rotary is None else known[rotary] for rotary in self._layers]


def candidates(model: PreTrainedModel, sizes: int | Sequence[int]) -> list[list[Rotary]]:
    """For every layer the ways in which it may rotate, the likeliest first; none for a layer without rotary positions.

    The code of a layer does not say everything. It may call a function or leave it, and a rotary module may have frequencies
    for several types of layers. Which of these is in use is seen in the layer's keys (`keepkv.cache.self_check`).

    Args:
        model: The model.
        sizes: d, the size of a key, of all layers or of each.
    """
    attention = attention_modules(model)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    sizes = [sizes] * layers if isinstance(sizes, int) else sizes
    some = next(iter(attention.values()), None)  # models that run through their layers more than once count on
    if some is None:
        return [[] for _ in sizes]
    types = list(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    shared = [(module, _by_layer_type(module)) for module in _rotary_modules(model.get_decoder())]
    result = []
    for index, size in enumerate(sizes):
        module = attention.get(index, some)
        own = [(rotary, _by_layer_type(rotary)) for rotary in _rotary_modules(module)]
        likeliest = list(dict.fromkeys([*types[index : index + 1], *types]))
        ways = [
            Rotary(function, rotary, layer_type, size, at_end)
            for at_end in (False, True)
            for rotary, by_layer_type in own or shared
            for layer_type in (likeliest if by_layer_type and likeliest else [None])
            for function in _rotary_functions(module)
        ]
        result.append(ways)
    return result


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The modules of a decoder that know their layer's index and name a function that rotates, by that index."""
    modules: dict[int, nn.Module] = {}
    for module in model.get_decoder().modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and any(_rotary_functions(module)):
            modules.setdefault(index, module)
    return modules


def _rotary_functions(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """The functions named after rotary positions that a module's forward calls, as its own code finds them."""
    names, namespace = _names(type(module).forward)
    for name in names:
        found = namespace.get(name)
        if callable(found) and not inspect.isclass(found):
            yield found


@cache
def _names(forward: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names in a forward function that speak of rotary positions, and where they are looked up."""
    forward = inspect.unwrap(forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return tuple(name for name in names if "rotary" in name or "rope" in name), getattr(forward, "__globals__", {})


def _rotary_modules(holder: nn.Module) -> list[nn.Module]:
    """The modules within another one that may make its angles."""
    named = ((f"{name.rpartition('.')[2]} {type(module).__name__}".lower(), module) for name, module in holder.named_modules())
    return [module for names, module in named if "rotary" in names.split()[0] or "rotaryembedding" in names]


def _by_layer_type(rotary: nn.Module) -> bool:
    """Whether a rotary module has frequencies for several types of layers."""
    return "layer_type" in inspect.signature(rotary.forward).parameters


def _as_slice(numbers: list[int]) -> slice | None:
    """Numbers as a slice, if their distances are all the same."""
    if not numbers:
        return slice(0, 0, 1)
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    regular = step > 0 and numbers == list(range(numbers[0], numbers[-1] + 1, step))
    return slice(numbers[0], numbers[-1] + 1, step) if regular else None


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{getattr(function, '__name__', function)}"
