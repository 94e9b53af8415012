"""Checkup: whether a model works with keepkv, tried on the model itself, and what a budget would save.

`keepkv check MODEL` prints it, and the table of docs/models.md is made of it (benchmarks/model_table.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from keepkv.cache import KeepCache, other_layers
from keepkv.documents.format import Contents, write
from keepkv.documents.packing import pack, unpack
from keepkv.errors import KeepKVError, ModelError
from keepkv.models import families

PROMPT, LATER = 96, 6  # tokens that are read, and then written one by one
SLOTS = 24  # per KV head on average: the budget that is tried
_MOVED = {2: 2e-2, 4: 1e-4, 8: 1e-4}  # a model rounds its own angles to float32
_ROUNDING = {2: 5e-2, 4: 1e-3, 8: 1e-6}  # by bytes of a number: how far logits may be off where every token is kept


class Trial(NamedTuple):
    """One thing that was tried.

    Attributes:
        name: What must hold.
        passed: Whether it does.
        detail: What was seen.
    """

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Checkup:
    """What was found.

    Args:
        family: The model's type in transformers.
        refusal: Why the model cannot be compressed, and what to do; "" if it can. Nothing else is known then.
        layers: All layers.
        compressed: Those of them that are compressed.
        windows: Those with a sliding window or chunks.
        states: Those with a state that every token changes (linear attention, Mamba, convolutions), compressed ones too.
        sharing: Those that use another layer's keys, or hold nothing else either.
        unrotated: Compressed layers that do not rotate their keys.
        heads: KV heads of a compressed layer.
        size: d, the size of a key of those.
        window: Tokens that a sliding window holds; 0 without one.
        element: Bytes of a number.
        window_bytes: Of one token in all sliding windows together.
        state_bytes: Of all states, whatever the length.
        trials: What was tried.
    """

    family: str
    refusal: str = ""
    layers: int = 0
    compressed: int = 0
    windows: int = 0
    states: int = 0
    sharing: int = 0
    unrotated: int = 0
    heads: int = 0
    size: int = 0
    window: int = 0
    element: int = 0
    window_bytes: int = 0
    state_bytes: int = 0
    trials: tuple[Trial, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the model may be used with keepkv: nothing failed."""
        return not self.refusal and all(trial.passed for trial in self.trials)

    @property
    def token_bytes(self) -> int:
        """By how many bytes the full cache grows with each token beyond the windows."""
        return 2 * self.compressed * self.heads * self.size * self.element

    def full_bytes(self, tokens: int) -> int:
        """Bytes of transformers' cache of so many tokens."""
        return tokens * self.token_bytes + min(tokens, self.window) * self.window_bytes + self.state_bytes

    def kept_bytes(self, tokens: int, share: float) -> int:
        """The same where the layers with full attention are compressed to a share."""
        return round(self.full_bytes(tokens) - (1 - share) * tokens * self.token_bytes)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        trials = [trial._asdict() for trial in self.trials]
        return {**asdict(self), "trials": trials, "passed": self.passed, "token_bytes": self.token_bytes}


@torch.no_grad()
def check(model: PreTrainedModel) -> Checkup:
    """Tries a model: the self-check of its first cache, and then what the cache promises, on random tokens.

    Args:
        model: In evaluation mode.

    Examples:
        >>> from keepkv.models import loading
        >>> model, _ = loading.load("smollm2")
        >>> check(model).passed
        True
    """
    family = model.config.get_text_config(decoder=True).model_type
    try:
        cache = KeepCache(model, SLOTS, auto=False)
    except ModelError as error:
        return Checkup(family, str(error))
    heads, size = families.key_shape(model)
    model(input_ids=_random_tokens(model)[:, :1], past_key_values=cache)
    windows = [layer for layer in cache.layers if other_layers.has_window(layer)]
    states = [layer for layer in cache.layers if other_layers.has_state(layer)]
    return Checkup(
        family,
        layers=len(cache.layers),
        compressed=len(cache.keep_layers),
        windows=len(windows),
        states=len(states),
        sharing=sum(not other_layers.tensors(layer) for layer in cache.layers),
        unrotated=sum(not len(rotation.frequencies) for rotation in cache.keep_rotations),
        heads=heads,
        size=size,
        window=max((layer.sliding_window for layer in windows), default=1) - 1,
        element=model.dtype.itemsize,
        window_bytes=sum(x.numel() * x.element_size() for layer in windows for x in (layer.keys, layer.values)),
        state_bytes=sum(x.numel() * x.element_size() for layer in states for _, _, x in other_layers.state_tensors(layer)),
        trials=tuple(_trials(model)),
    )


def _trials(model: PreTrainedModel) -> Iterator[Trial]:
    ids = _random_tokens(model)
    for trial in (_exact, _moved, _compact, _forked, _saved):
        name = (trial.__doc__ or "").strip().rstrip(".")
        try:
            passed, detail = trial(model, ids)
        except KeepKVError as error:
            passed, detail = False, str(error)
        yield Trial(name, passed, detail)


def _exact(model: PreTrainedModel, ids: Tensor) -> tuple[bool, str]:
    """With every token kept, the logits are those of transformers' cache."""
    config = model.config.get_text_config(decoder=True)
    expected = _logits(model, ids, DynamicCache(config=config))
    got = _logits(model, ids, KeepCache(model, 1.0))
    off = float((got - expected).norm() / expected.norm())
    return off <= _ROUNDING.get(model.dtype.itemsize, _ROUNDING[2]), f"off by {off:.1e} of their norm"


def _moved(model: PreTrainedModel, ids: Tensor) -> tuple[bool, str]:
    """A query or key that is moved is what the model makes at that place, forward and backward."""
    last = min(families.trained_length(model) or 1000, 1000) - 1
    places = torch.tensor([last // 3, last], device=ids.device).repeat_interleave(PROMPT)[:, None]
    cache = KeepCache(model, auto=False)
    model(input_ids=ids[0, :PROMPT].repeat(2)[:, None], position_ids=places, past_key_values=cache)  # each token alone
    off = 0.0
    for layer, rotation in zip(cache.keep_layers, cache.keep_rotations, strict=True):
        assert layer.watch is not None, "a cache that is not compressed watches"
        for vectors in (layer.keys, *layer.watch.pending):
            here, there = vectors.double().reshape(2, -1, 1, vectors.shape[-1])
            shift = places[-1] - places[0]
            for moved, goal in ((rotation.rotate(here, shift), there), (rotation.rotate(there, -shift), here)):
                off = max(off, float((moved - goal).norm() / goal.norm()))
    return off <= _MOVED.get(model.dtype.itemsize, _MOVED[2]), f"off by {off:.1e} over {last - last // 3} positions"


def _compact(model: PreTrainedModel, ids: Tensor) -> tuple[bool, str]:
    """A compressed cache is smaller, and it is what the model attends to."""
    cache = KeepCache(model, SLOTS)
    model(input_ids=ids[:, :PROMPT], past_key_values=cache)
    slots = max(max(layer.slots.counts) for layer in cache.keep_layers if layer.slots is not None)
    held = sum(sum(layer.slots.counts) for layer in cache.keep_layers if layer.slots is not None)
    emptied = cache.fork()
    for layer in emptied.keep_layers:
        assert layer.slots is not None, "it was compressed"
        layer.slots = replace(layer.slots, values=torch.zeros_like(layer.slots.values[:]))
    got, without = (_later(model, ids, each) for each in (cache, emptied))
    small = held <= SLOTS * cache.heads and all(layer.tail == 0 or layer.slots for layer in cache.keep_layers)
    used = bool((got - without).norm() > 1e-3 * got.norm())
    finite = bool(got.isfinite().all())
    return small and used and finite, f"{held / cache.heads:.1f} of {PROMPT} tokens per head, at most {slots}"


def _forked(model: PreTrainedModel, ids: Tensor) -> tuple[bool, str]:
    """A fork goes on as the cache itself, to the last bit."""
    cache = KeepCache(model, SLOTS)
    model(input_ids=ids[:, :PROMPT], past_key_values=cache)
    twin = cache.fork()
    return torch.equal(_later(model, ids, cache), _later(model, ids, twin)), f"{LATER} tokens"


def _saved(model: PreTrainedModel, ids: Tensor) -> tuple[bool, str]:
    """A saved cache goes on as the cache itself, to the last bit."""
    cache = KeepCache(model, SLOTS)
    model(input_ids=ids[:, :PROMPT], past_key_values=cache)
    header, tensors = pack(cache)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cache.keep"
        write(file, header, tensors)
        loaded = unpack(Contents(file), model, model.device)
        return torch.equal(_later(model, ids, cache), _later(model, ids, loaded)), f"{LATER} tokens"


def _logits(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    """Logits of the prompt and of what follows it, [1, PROMPT + LATER, vocabulary] float64."""
    prompt: Tensor = model(input_ids=ids[:, :PROMPT], past_key_values=cache).logits
    return torch.cat([prompt.double(), _later(model, ids, cache)], 1)


def _later(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    """Logits of what follows the prompt, read one by one."""
    steps = [model(input_ids=ids[:, n : n + 1], past_key_values=cache).logits for n in range(PROMPT, PROMPT + LATER)]
    return torch.cat(steps, 1).double()


def _random_tokens(model: PreTrainedModel) -> Tensor:
    """Tokens [1, PROMPT + LATER], the same every time."""
    embeddings: Any = model.get_input_embeddings()
    chance = torch.Generator().manual_seed(0)
    size = min(embeddings.weight.shape[0], model.config.get_text_config(decoder=True).vocab_size)
    return torch.randint(3, size, (1, PROMPT + LATER), generator=chance).to(model.device)
