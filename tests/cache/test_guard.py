"""A cache is as it was before, or as it should be: interrupted, on a full disk, with another model, read twice."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from helpers import make_model, tokens
from keepkv import BudgetError, InputError, KeepCache, KeepKVError, ModelError
from keepkv.cache.backing import Backing
from keepkv.models import identity
from keepkv.models.families import projections


def held(cache: KeepCache) -> list[object]:
    """Everything that a cache holds, as values that can be compared."""
    parts: list[object] = [cache.policy, cache.compressed, cache.auto, cache.starts]
    for layer in cache.layers:
        parts += [layer.get_seq_length(), layer.keys.tolist() if layer.is_initialized else None]
        slots = getattr(layer, "slots", None)
        parts.append(slots and (slots.offsets, slots.positions.tolist(), slots.bias.tolist()))
    return parts


class Interrupt:
    """A progress that ends in Ctrl-C at its n-th call."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, done: int, of: int) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt


OPERATIONS: dict[str, Callable[[object, KeepCache, Interrupt], object]] = {
    "compress": lambda model, cache, progress: cache.compress(12, progress=progress),
    "fold": lambda model, cache, progress: cache.compress(20, "keepkv", progress),
    "read": lambda model, cache, progress: cache.read(model, tokens(1, 60, seed=3), progress=progress),
    "refresh": lambda model, cache, progress: cache.refresh(progress),
    "keep": lambda model, cache, progress: cache.read(model, tokens(1, 40), keep=[(90, 95)], progress=progress),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("calls", [0, 1])
def test_an_operation_that_is_interrupted_changes_nothing(name: str, calls: int) -> None:
    model = make_model()
    cache = KeepCache(model, 24, "snapkv", chunk=32, backing="cpu")
    cache.read(model, tokens(1, 80))
    twin, before = cache.fork(), held(cache)
    layers = list(cache.layers)
    with pytest.raises(KeyboardInterrupt):
        OPERATIONS[name](model, cache, Interrupt(calls))
    assert held(cache) == before
    assert all(ours is theirs for ours, theirs in zip(cache.layers, layers, strict=True))
    ids = tokens(1, 9, seed=5)
    assert torch.equal(*(model(ids, past_key_values=each).logits for each in (cache, twin)))


def test_a_pass_that_breaks_off_is_said_and_a_fork_goes_on() -> None:
    model = make_model()
    cache = KeepCache(model, 24, "snapkv", tail=8)
    cache.read(model, tokens(1, 60))
    twin = cache.fork()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(1, 4), past_key_values=cache)
    handle.remove()
    for use in (
        lambda: model(tokens(1, 4), past_key_values=cache), lambda: cache.crop(-1), lambda: cache.read(model, tokens(1, 4)),
    ):  # fmt: skip
        with pytest.raises(KeepKVError, match="is torn"):
            use()
    model(tokens(1, 4), past_key_values=twin)
    cache.reset()
    cache.read(model, tokens(1, 60))
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), FileNotFoundError(2, "No such file or directory")])
def test_a_disk_that_fails_is_said_and_costs_nothing(error: OSError, monkeypatch) -> None:
    model = make_model()
    cache = KeepCache(model, 24, "snapkv", period=32, backing="disk").read(model, tokens(1, 60))
    before = held(cache)

    def fails(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "NamedTemporaryFile", fails)
        with pytest.raises(KeepKVError, match=f"kept on disk \\({error.strerror}\\)"):
            cache.read(model, tokens(1, 60))
    assert held(cache) == before
    cache.read(model, tokens(1, 60))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_what_is_on_disk_is_what_was_given_and_takes_its_room(dtype: torch.dtype, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    keys = torch.randn(2, 3, 5, 8).to(dtype)[:, :, 1:]
    (kept, values), = Backing("disk").add(keys, keys + 1, None).parts  # fmt: skip
    assert torch.equal(kept, keys)
    assert torch.equal(values, keys + 1)
    assert not list(tmp_path.iterdir())


def test_a_cache_knows_its_model() -> None:
    model, copy, other = make_model(), make_model(), make_model(seed=1)
    wider = make_model(num_key_value_heads=4)
    deeper = make_model(num_hidden_layers=4)
    cache = KeepCache(model, 24, "snapkv").read(model, tokens(1, 60))
    cache.fork().read(copy, tokens(1, 4))  # the same weights
    for wrong in (other, wider, deeper, make_model(rms_norm_eps=1e-2)):
        with pytest.raises(KeepKVError, match="made for another model"):
            cache.fork().read(wrong, tokens(1, 4))
    for wrong in (wider, deeper):
        with pytest.raises(KeepKVError, match="made for another model"):
            wrong(tokens(1, 4), past_key_values=cache.fork())
    del model
    cache.read(copy, tokens(1, 4))


def test_a_crop_that_fails_changes_nothing() -> None:
    model = make_model("gemma3", layer_types=["full_attention", "sliding_attention", "sliding_attention"])
    cache = KeepCache(model, "100%", "full")
    model(tokens(1, 60), past_key_values=cache)
    twin, before = cache.fork(), held(cache)
    with pytest.raises(KeepKVError, match="sliding window"):
        cache.crop(-3)
    assert held(cache) == before
    assert torch.equal(*(model(tokens(1, 4), past_key_values=each).logits for each in (cache, twin)))


@pytest.mark.parametrize("way", ["lookup", "assistant"])
def test_assisted_generation_over_a_cache_that_has_read_is_refused(way: str) -> None:
    if not hasattr(Cache, "activate_past_recording"):
        pytest.skip("this transformers does not say that it will take back what it reads")
    model = make_model()
    more = {"prompt_lookup_num_tokens": 3} if way == "lookup" else {"assistant_model": make_model(seed=1)}
    ids = tokens(1, 60)
    cache = KeepCache(model, "50%", "snapkv", tail=8)
    expected = model.generate(ids, past_key_values=KeepCache(model, "50%", "snapkv", tail=8), max_new_tokens=4, do_sample=False)
    read = cache.fork().read(model, ids[:, :-1])
    with pytest.raises(KeepKVError, match="read the whole prompt again"):
        model.generate(ids, past_key_values=read, max_new_tokens=4, do_sample=False, **more)
    assert model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, **more).shape == expected.shape


def test_a_prompt_in_several_passes_is_warned_about_once() -> None:
    model, ids = make_model(), tokens(1, 100)
    with pytest.warns(UserWarning, match="a second pass of 32 tokens") as said:
        model.generate(ids, past_key_values=KeepCache(model, 12, "snapkv"), max_new_tokens=2, prefill_chunk_size=32)
    assert len(said) == 1
    live = KeepCache(model, 12, "snapkv", chunk=32)
    model.generate(ids, past_key_values=live, max_new_tokens=2, prefill_chunk_size=32)
    read = KeepCache(model, 12, "snapkv").read(model, ids[:, :32])
    model(ids[:, 32:64], past_key_values=read)  # a question of the same length is none


def test_nothing_to_read_is_said() -> None:
    model = make_model()
    with pytest.raises(InputError, match="empty"):
        KeepCache(model, 12).read(model, tokens(1, 0))
    cache = KeepCache(model, 12).read(model, tokens(1, 30))
    assert cache.read(model, tokens(1, 0)).get_seq_length() == 30


@pytest.mark.parametrize("budget", [0, 1, 3.0, "2", "100B"])
def test_a_live_cache_refuses_what_is_too_small_for_any_text(budget: object) -> None:
    model = make_model()
    cache = KeepCache(model, 24, "snapkv", period=16).read(model, tokens(1, 60))
    before = held(cache)
    with pytest.raises(BudgetError, match=r"must be kept|outside its range"):
        cache.compress(budget if budget != 3.0 else 3)
    assert held(cache) == before


def test_weights_that_are_no_numbers_are_not_read() -> None:
    model = make_model(dtype=torch.float32)
    attention = [layer.self_attn for layer in model.model.layers]

    def replaced(number: int, change: Callable[[Tensor], Tensor]) -> None:
        attention[number].o_proj.weight = torch.nn.Parameter(change(attention[number].o_proj.weight.data), requires_grad=False)

    replaced(0, lambda weight: weight.to("meta"))
    replaced(1, lambda weight: weight.to(torch.float8_e4m3fn))
    assert [each is None for each in projections(model)] == [True, True, False]
    with pytest.raises(ModelError, match="not in memory"):
        identity.of_model(model)
    identity.fingerprint(model)


def test_a_cache_of_inference_mode_can_be_used_outside_it() -> None:
    model = make_model()
    cache = KeepCache(model, 24, "keepkv", period=16)
    with torch.inference_mode():
        cache.read(model, tokens(1, 60))
    twin = KeepCache(model, 24, "keepkv", period=16).read(model, tokens(1, 60))
    for seed in range(3):
        ids = tokens(1, 12, seed)
        with torch.enable_grad():
            assert torch.equal(*(model(ids, past_key_values=each).logits for each in (cache, twin)))


@pytest.mark.parametrize(
    "method", ["keepkv", "snapkv", "attention-matching", "compactor", "keepkv-paper", "kvmerger", "minicache"]
)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15, 1e20])
def test_keys_and_values_of_any_size_give_numbers(method: str, scale: float) -> None:
    model = make_model(dtype=torch.float32)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data *= scale
        layer.self_attn.v_proj.weight.data *= min(scale, 1e15)  # what the next layer squares
    for ids in (tokens(1, 40), torch.full((1, 40), 7)):
        cache = KeepCache(model, "40%", method, check=False).read(model, ids)
        assert bool(model(tokens(1, 3), past_key_values=cache).logits.isfinite().all())
