"""The self-check: whether a model may be compressed is tried, not looked up by name.

The first cache for a model's class and configuration runs the model on a few tokens:

1. *Rotation.* Four tokens are read alone, each at three positions. A token that is alone attends to itself only, so its hidden
   states do not depend on the position, and what changes in its keys and queries is the rotation and nothing else. It must be
   one of those that the model's code offers (`keepkv.models.rotation`), or none.
2. *Attention.* A short text is read into a cache that keeps everything, and some more tokens after that. What the model then
   computes must be what it computes with transformers' own cache: the logits, or, to save time, the keys of the layer behind
   the first layers of every kind. The same must come out where the short text has become slots, a token each: then keepkv's
   own attention computes it, and not the model's.

That costs about as much as writing one token for twelve sequences at once, and a few layers more. The verdict is remembered for
the model's class, configuration and way of attending. A model that fails is refused, and the error names the property that is
missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from keepkv.cache.attention_function import leave
from keepkv.cache.layer import KeepLayer
from keepkv.cache.other_layers import has_state
from keepkv.cache.report import Report
from keepkv.errors import KeepKVError, ModelError
from keepkv.models import families
from keepkv.models.rotation import Rotaries, Rotary, candidates
from keepkv.ops.rope import Rotation
from keepkv.slots.slots import Slots

if TYPE_CHECKING:
    from keepkv.cache.cache import KeepCache

Choice = tuple[tuple[int, int] | None, ...]  # per layer the candidate for its rotation and the size of a key; None: no rotation

_TOKENS = 4  # read alone at every position
_FAR = 2000  # the farthest position that is tried
_PROMPT, _LATER = 16, 3  # tokens of the text that is read into both caches, and after that
_ROTATED = {2: 2e-2, 4: 1e-3, 8: 1e-3}  # by bytes of a number: how far a rotated vector may be off, of its length
_ATTENDED = {2: 5e-2, 4: 1e-3, 8: 1e-6}  # and what is computed with the cache
_OTHERWISE = "use the model with transformers' own cache (past_key_values=None)"

_verdicts: dict[tuple[type, str, str], Choice | str] = {}  # of the models tried in this process; a str is the refusal


def checked(model: PreTrainedModel, new_cache: Callable[..., KeepCache]) -> Rotaries:
    """How a model's layers rotate, after the self-check, which is run once for a class and configuration.

    Args:
        model: The model. Its modules are put into evaluation mode while it is tried.
        new_cache: Makes a cache for it that is not checked; takes the other arguments of `KeepCache`.

    Raises:
        ModelError: for a model that cannot be compressed.
    """
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    key = type(model), model.config.to_json_string(use_diff=False), attention
    if key not in _verdicts:
        try:
            _verdicts[key] = _tried(model, new_cache)
        except KeepKVError as error:
            _verdicts[key] = str(error)
    verdict = _verdicts[key]
    if isinstance(verdict, str):
        leave(model)
        raise ModelError(verdict)
    return _chosen(model, verdict)


def unchecked(model: PreTrainedModel) -> Rotaries:
    """How a model's layers rotate as its code suggests."""
    return Rotaries([ways[0] if ways else None for ways in candidates(model, families.key_shape(model)[1])])


def _chosen(model: PreTrainedModel, choice: Choice) -> Rotaries:
    ways = candidates(model, [size for _, size in (pick or (0, 0) for pick in choice)])
    return Rotaries([None if pick is None else own[pick[0]] for own, pick in zip(ways, choice, strict=True)])


@torch.no_grad()
def _tried(model: PreTrainedModel, new_cache: Callable[..., KeepCache]) -> Choice:
    """Runs the model, see the top of this file. Raises KeepKVError."""
    with _evaluating(model):
        choice = _rotations_in_use(model, new_cache(auto=False))
        _check_attention(model, new_cache, choice)
    return choice


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _rotations_in_use(model: PreTrainedModel, cache: KeepCache) -> Choice:
    """Which of the rotations that the code offers each layer's keys and queries show. Raises ModelError."""
    places = [0, 1, min(_FAR, families.trained_length(model) or _FAR) - 1]
    cache.guarded = False  # what is wrong with its keys is said here
    ids = _some_tokens(model, _TOKENS)[0].repeat(len(places))[:, None]
    positions = torch.tensor(places, device=ids.device).repeat_interleave(_TOKENS)[:, None]
    _run(model, ids, cache, position_ids=positions)
    _check_keys(model, cache)
    ways = candidates(model, [0 if layer is None else layer.keys.shape[-1] for layer in map(_with_keys, cache.layers)])
    known: dict[Rotary, Rotation | ModelError] = {}
    choice: list[tuple[int, int] | None] = []
    for index, layer in enumerate(cache.layers):
        if _with_keys(layer) is None:
            choice.append(None)
            continue
        vectors = [layer.keys]
        if isinstance(layer, KeepLayer):
            assert layer.watch is not None, "a cache that is not compressed watches"
            vectors += layer.watch.pending
        apart = [x.reshape(len(places), -1, 1, x.shape[-1]) for x in vectors]
        choice.append(_in_use(index, apart, places, ways[index], known))
    return tuple(choice)


def _in_use(
    index: int, vectors: list[Tensor], places: list[int], ways: list[Rotary], known: dict[Rotary, Rotation | ModelError]
) -> tuple[int, int] | None:
    """The first rotation that explains one layer's vectors, each [places, n, 1, d]. Raises ModelError."""
    if all(_explains(Rotation.none(), x, places) for x in vectors):
        return None
    for number, rotary in enumerate(ways):
        if rotary not in known:
            known[rotary] = _rotation(rotary, places[-1] + 1)
        rotation = known[rotary]
        if isinstance(rotation, Rotation) and all(_explains(rotation, x, places) for x in vectors):
            return number, rotary.size
    if not ways:
        raise ModelError(
            f"layer {index} changes keys or queries with the position, and its code names no rotation (positions are learned, "
            f"perhaps), so keepkv could not move them: {_OTHERWISE}"
        )
    reasons = [f" ({refusal})" for rotary in ways if isinstance(refusal := known[rotary], ModelError)]
    raise ModelError(
        f"layer {index} changes keys or queries with the position in another way than by the rotation that its code names, so "
        f"keepkv could not move them{(reasons or [''])[0]}: {_OTHERWISE}"
    )


def _rotation(rotary: Rotary, length: int) -> Rotation | ModelError:
    """A rotation, or why its function is none."""
    try:
        return rotary.rotation(None if rotary.fixed else length)
    except ModelError as error:
        return error


def _explains(rotation: Rotation, x: Tensor, places: list[int]) -> bool:
    """Whether the vectors [places, n, 1, d] at the other places are those at the first, moved."""
    start = x[0].double()
    there = torch.cat([rotation.rotate(start, torch.tensor([place - places[0]], device=x.device)) for place in places[1:]])
    return float((x[1:].flatten(0, 1) - there).norm()) <= _ROTATED[x.element_size()] * float(there.norm())


def _with_keys(layer: Any) -> Any:
    """The layer, if it holds keys; None if it holds a state, or nothing of its own."""
    return layer if isinstance(layer, CacheLayerMixin) else None


def _check_keys(model: PreTrainedModel, cache: KeepCache) -> None:
    """Raises ModelError unless every layer has handed over keys and values once, as large as the configuration says."""
    shape = families.key_shape(model)
    for index, layer in enumerate(cache.layers):
        if _with_keys(layer) is None:
            continue
        if not layer.is_initialized:
            raise ModelError(f"layer {index} hands no keys to the cache (it shares another layer's, perhaps): {_OTHERWISE}")
        if not isinstance(layer, KeepLayer):
            continue
        if layer.keys.shape != layer.values.shape:
            raise ModelError(
                f"layer {index} has keys of {layer.keys.shape[-1]} and values of {layer.values.shape[-1]} dimensions (latent "
                f"attention, perhaps): {_OTHERWISE}"
            )
        if (layer.keys.shape[1], layer.keys.shape[3]) != shape:
            raise ModelError(
                f"layer {index} has {layer.keys.shape[1]} KV heads of {layer.keys.shape[3]} dimensions, but the configuration "
                f"says {shape[0]} of {shape[1]}: {_OTHERWISE}"
            )
        rounds = 0 if layer.watch is None else len(layer.watch.pending)
        if rounds != 1 or layer.asked:
            times = rounds * layer.users + len(layer.asked)
            expected = "once" if layer.users == 1 else f"{layer.users} times"
            raise ModelError(
                f"the keys of layer {index} are attended to {times} times for a token, not {expected}: {_OTHERWISE}"
            )


def _check_attention(model: PreTrainedModel, new_cache: Callable[..., KeepCache], choice: Choice) -> None:
    """Raises ModelError unless a cache that keeps everything does what transformers' own does."""
    ours = new_cache(1.0)
    ours.guarded = False  # a pass ends in the middle
    theirs = DynamicCache(config=model.config.get_text_config(decoder=True))
    stop = len(ours.layers) if ours._all_calls > len(ours.keep_layers) else _first_layers(ours.layers, choice)
    if stop < len(ours.layers):
        for cache in (ours, theirs):
            cache.layers = [*cache.layers[:stop], _Stop()]  # type: ignore[no-untyped-call]
    ids = _some_tokens(model, _PROMPT + _LATER)
    expected = _run(model, ids[:, :_PROMPT], theirs)
    _compare(_run(model, ids[:, :_PROMPT], ours), expected, "with every token kept", model)
    compact = _in_slots(ours)
    expected = _run(model, ids[:, _PROMPT:], theirs)
    _compare(_run(model, ids[:, _PROMPT:], ours), expected, "with every token kept", model)
    _compare(_run(model, ids[:, _PROMPT:], compact), expected, "with every token in a slot of its own", model)


def _compare(got: Tensor, expected: Tensor, when: str, model: PreTrainedModel) -> None:
    """Raises ModelError unless both are the same but for rounding."""
    off = float((got - expected).norm() / expected.norm().clamp(min=1e-30))
    if not off <= _ATTENDED.get(model.dtype.itemsize, _ATTENDED[2]):
        raise ModelError(
            f"{when}, the model computes something else than with transformers' own cache (off by {off:.2g} of the whole): its "
            f"attention is not one scaled dot product over the keys and values that it hands to the cache, with at most a cap "
            f"and sinks. {_OTHERWISE[0].upper()}{_OTHERWISE[1:]}"
        )


def _in_slots(cache: KeepCache) -> KeepCache:
    """A fork in which every token of one row has become a slot."""
    twin = cache.fork()
    twin.restore(Report("", "", ()))
    for layer in twin.keep_layers:
        if not layer.is_initialized:  # behind the layers that are tried
            continue
        heads, count = layer.keys.shape[1:3]
        bias = torch.zeros(heads * count, device=layer.keys.device)
        positions = torch.arange(count, device=layer.keys.device).repeat(heads).int()
        offsets = tuple(range(0, heads * count + 1, count))
        layer.compact(Slots(layer.keys[0].flatten(0, 1), layer.values[0].flatten(0, 1), bias, positions, offsets), 0)
        layer.watch = None
    return twin


def _first_layers(layers: Sequence[Any], choice: Choice) -> int:
    """How many of the first layers have one of every kind, and are followed by one that hands over keys first, to stop at."""
    kinds = list(zip(map(type, layers), choice, strict=True))
    enough = 1 + max(kinds.index(kind) for kind in set(kinds))
    ends = [index for index, layer in enumerate(layers) if _with_keys(layer) is not None and not has_state(layer)]
    return next((index for index in ends if index >= enough), len(layers))


class _EnoughError(Exception):
    """Ends a forward pass, with the keys of the layer where it ended."""


class _Stop(CacheLayerMixin):
    """Takes the place of a layer in front of which a forward pass ends."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise _EnoughError(torch.cat([key_states, value_states], -1))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


def _run(model: PreTrainedModel, ids: Tensor, cache: Any, **more: Any) -> Tensor:
    """The logits of a forward pass, or what the layer has got at which it ended. Raises KeepKVError."""
    try:
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, **more).logits.double()
        return logits
    except _EnoughError as enough:
        keys: Tensor = enough.args[0].double()
        return keys
    except KeepKVError:
        raise
    except Exception as error:
        what = (str(error).strip() or "no message").splitlines()[0]
        raise ModelError(f"a pass of a few tokens failed ({type(error).__name__}: {what}): {_OTHERWISE}") from error


def _some_tokens(model: PreTrainedModel, count: int) -> Tensor:
    """Different tokens, spread over the vocabulary, [1, count]."""
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    spread: Tensor = torch.arange(1, count + 1, device=model.device) * (size // (count + 1))
    return spread[None]
