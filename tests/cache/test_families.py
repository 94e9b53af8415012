"""Families with layers of several kinds, through everything that a cache does, against transformers' own cache.

Sliding windows and chunks, recurrent and convolution states, keys shared between layers, sinks, capped logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache as remembered
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from helpers import EVERYTHING, small_model, tokens
from keepkv import InputError, KeepCache, KeepKVError
from keepkv.cache import other_layers
from keepkv.documents.format import Contents, write
from keepkv.documents.joining.join import join
from keepkv.documents.packing import pack, unpack
from keepkv.lookback.bring_back import brought_back, exact
from keepkv.lookback.bring_back import tokens as again

SUNK, CAPPED = ("gpt_oss",), ("gemma2",)
SHARED = ("gemma3n_text", "gemma4_text")
RECURRENT = ("qwen3_next", "qwen3_5_text", "granitemoehybrid", "nemotron_h")
CONVOLVED = ("lfm2",)
BOTH = ("falcon_h1",)  # a state beside the keys, in the same layer
STATES = RECURRENT + CONVOLVED + BOTH
ALL = (*SUNK, *CAPPED, *SHARED, "llama4_text", *STATES)
every_family = pytest.mark.parametrize("kind", ALL)


@remembered
def model_of(kind: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = small_model(kind, dtype)
    model.generation_config.eos_token_id = None
    return model


def full(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def logits(model: PreTrainedModel, ids: Tensor, cache: Any, cuts: Sequence[int] = ()) -> Tensor:
    """What the model says while it reads ids, cut into several passes."""
    parts = torch.tensor_split(ids, list(cuts), 1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


def later(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    """The same, token by token, as text is written."""
    return logits(model, ids, cache, range(1, ids.shape[1]))


def close(got: Tensor, expected: Tensor, within: float) -> None:
    assert float((got - expected).norm() / expected.norm()) <= within


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_with_every_token_kept_it_is_bit_for_bit_transformers_cache(kind: str, dtype: torch.dtype) -> None:
    model, ids = model_of(kind, dtype), tokens(2, 70)
    ours = KeepCache(model, 1.0)
    theirs = full(model)
    for part in torch.tensor_split(ids, [40, 41, 42, 60], 1):
        assert torch.equal(model(part, past_key_values=ours).logits, model(part, past_key_values=theirs).logits)
    assert ours.get_seq_length() == 70


@every_family
def test_reading_in_chunks_loses_nothing_while_there_is_room(kind: str) -> None:
    model, ids = model_of(kind), tokens(1, 70)
    read = KeepCache(model, 0.99, EVERYTHING, chunk=24, slot_dtype="float").read(model, ids[:, :60])
    assert read.report().compressions
    theirs = full(model)
    logits(model, ids[:, :60], theirs, (12, 36))
    close(later(model, ids[:, 60:], read), later(model, ids[:, 60:], theirs), 1e-6)


@every_family
def test_folds_of_a_live_cache_lose_nothing_that_they_keep(kind: str) -> None:
    """Folded again and again by a method that keeps every entry; and with a small budget it stays small and finite."""
    model, ids = model_of(kind), tokens(1, 100)
    for budget, method in ((0.99, EVERYTHING), (32, "keepkv")):
        ours, theirs = KeepCache(model, budget, method, period=16, slot_dtype="float"), full(model)
        got, expected = (logits(model, ids, cache, (40, 41, 50, 51, 66, 67, 68, 84)) for cache in (ours, theirs))
        assert ours.report().compressions > 2
        if budget == 0.99:
            close(got, expected, 1e-6)
        else:
            assert got.isfinite().all()
            assert all(max(layer.slots.counts) + layer.tail <= 5 * 32 + 16 for layer in ours.keep_layers)


@every_family
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_and_beam_search(kind: str, beams: int) -> None:
    model, ids = model_of(kind), tokens(2, 50)
    options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 2}
    expected = model.generate(ids, past_key_values=full(model), **options)
    assert torch.equal(model.generate(ids, past_key_values=KeepCache(model, 1.0), **options), expected)
    small = KeepCache(model, "25%")
    assert model.generate(ids, past_key_values=small, **options).shape == expected.shape
    assert small.report().compressions == 1


@every_family
def test_left_padded_batches(kind: str) -> None:
    """As transformers' own cache; a row differs from the row alone no more than it does there."""
    model = model_of(kind, torch.float32)  # in float64, transformers' eager attention is NaN in padding
    ids, mask = tokens(2, 56), torch.ones(2, 56, dtype=torch.int64)
    mask[0, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def run(cache: Any) -> Tensor:
        parts = [
            model(ids[:, lo:hi], attention_mask=mask[:, :hi], position_ids=positions[:, lo:hi], past_key_values=cache).logits
            for lo, hi in ((0, 50), (50, 51), (51, 56))
        ]
        return torch.cat(parts, 1)

    got, expected = run(KeepCache(model, 1.0)), run(full(model))
    assert torch.equal(got[:, 9:], expected[:, 9:])
    small = KeepCache(model, "25%", auto=False).read(model, ids[:, :50], mask[:, :50])
    small.compress()
    assert small.report().tokens == (41, 50)
    step = {"attention_mask": mask[:, :51], "position_ids": positions[:, 50:51]}
    assert model(ids[:, 50:51], past_key_values=small, **step).logits.isfinite().all()


@pytest.mark.parametrize("kind", STATES)
def test_a_pass_of_nothing_but_padding_in_a_row_is_refused(kind: str) -> None:
    model, ids, mask = model_of(kind), tokens(2, 49), torch.ones(2, 49, dtype=torch.int64)
    mask[0, :3] = 0
    with pytest.raises(InputError, match="a chunk of one token is padding"):
        KeepCache(model, 1.0, chunk=24).read(model, ids, mask)
    KeepCache(model, 1.0, chunk=23).read(model, ids, mask)


@every_family
def test_forks_go_on_alone(kind: str) -> None:
    """Models write to states in place: neither cache may see what the other one reads."""
    model, ids, other, budget = model_of(kind), tokens(1, 66), tokens(1, 6, seed=5), "25%"
    first, second = KeepCache(model, budget), KeepCache(model, budget)
    for cache in (first, second):
        logits(model, ids[:, :60], cache)
    twin = first.fork()
    there = later(model, other, twin)
    expected = later(model, ids[:, 60:], second)
    assert torch.equal(later(model, ids[:, 60:], first), expected)
    again = KeepCache(model, budget)
    logits(model, ids[:, :60], again)
    assert torch.equal(later(model, other, again), there)
    assert not torch.equal(there, expected)


@every_family
def test_rows_move_with_all_that_belongs_to_them(kind: str) -> None:
    model, ids = model_of(kind), tokens(3, 53)
    for budget in (1.0, "25%"):
        cache = KeepCache(model, budget)
        logits(model, ids[:, :50], cache)
        moved, fewer, twice = (cache.fork() for _ in range(3))
        order = torch.tensor([2, 0, 1])
        moved.reorder_cache(order)
        fewer.batch_select_indices(torch.tensor([1]))
        twice.batch_repeat_interleave(2)
        expected = later(model, ids[:, 50:], cache)
        close(later(model, ids[order, 50:], moved), expected[order], 1e-6)
        close(later(model, ids[1:2, 50:], fewer), expected[1:2], 1e-6)
        close(later(model, ids[:, 50:].repeat_interleave(2, 0), twice), expected.repeat_interleave(2, 0), 1e-6)


@every_family
@pytest.mark.parametrize("budget", [1.0, "25%"])
def test_a_file_holds_all_that_is_needed_to_go_on(kind: str, budget: float | str, tmp_path: Path) -> None:
    model, ids = model_of(kind), tokens(1, 64)
    cache = KeepCache(model, budget)
    logits(model, ids[:, :60], cache)
    write(tmp_path / "a.keep", *pack(cache))
    loaded = unpack(Contents(tmp_path / "a.keep"), model, model.device)
    assert loaded.report().kv_bytes == cache.report().kv_bytes
    twin = loaded.fork()
    expected = later(model, ids[:, 60:], cache)
    assert torch.equal(later(model, ids[:, 60:], loaded), expected)
    assert torch.equal(later(model, ids[:, 60:], twin), expected)
    fresh = unpack(Contents(tmp_path / "a.keep"), model, model.device)  # the file itself was not written to
    assert torch.equal(later(model, ids[:, 60:], fresh), expected)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("change", ["missing", "number", "shape", "read"])
def test_a_file_whose_states_do_not_fit_is_refused(kind: str, change: str, tmp_path: Path) -> None:
    model = model_of(kind)
    cache = KeepCache(model, 1.0)
    logits(model, tokens(1, 60), cache)
    header, tensors = pack(cache)
    index, fields = next((i, fields) for i, fields in enumerate(header["layers"]) if "states" in fields)
    name = next(iter(fields["states"]))
    if change == "missing":
        del tensors[f"layer.{index}.{name}"]
    elif change == "number":
        fields["states"][name.replace("0", "7")] = fields["states"].pop(name)
        tensors[f"layer.{index}.{name.replace('0', '7')}"] = tensors.pop(f"layer.{index}.{name}")
    elif change == "shape":
        fields["states"][name] = [2, *fields["states"][name][1:]]
    else:
        fields["read"] = []
    write(tmp_path / "a.keep", header, tensors)
    with pytest.raises(InputError, match=r"not a whole \.keep file"):
        unpack(Contents(tmp_path / "a.keep"), model, model.device)


@every_family
def test_crop_is_exact_or_refused(kind: str) -> None:
    model, ids = model_of(kind), tokens(1, 70)
    short = 16  # no window has moved on
    cache = KeepCache(model, 1.0)
    logits(model, ids[:, :short], cache)
    if kind in STATES:
        twin = cache.fork()
        with pytest.raises(KeepKVError, match="a state that every token changes"):
            cache.crop(-3)
        cache.crop(0)
        cache.crop(short)  # that many stay: all of them
        assert torch.equal(later(model, ids[:, short:24], cache), later(model, ids[:, short:24], twin))
        assert cache.is_croppable == (kind in CONVOLVED)
        return
    cache.crop(-3)
    expected = KeepCache(model, 1.0)
    logits(model, ids[:, : short - 3], expected)
    cuts = (1, 20)
    close(logits(model, ids[:, short - 3 :], cache, cuts), logits(model, ids[:, short - 3 :], expected, cuts), 1e-6)
    twin = cache.fork()
    with pytest.raises(KeepKVError, match="has moved on"):
        cache.crop(-3)
    assert torch.equal(later(model, ids[:, :4], cache), later(model, ids[:, :4], twin))


@pytest.mark.parametrize("kind", [*CONVOLVED, *SUNK, *SHARED])
def test_what_records_its_past_can_be_cropped(kind: str) -> None:
    model, ids = model_of(kind), tokens(1, 70)
    cache, expected = KeepCache(model, 1.0), KeepCache(model, 1.0)
    cache.activate_past_recording()
    logits(model, ids[:, :60], cache)
    cache.crop(0)
    logits(model, ids[:, 50:56], cache)
    cache.crop(-6)
    logits(model, ids[:, :60], expected)
    close(logits(model, ids[:, 60:], cache), logits(model, ids[:, 60:], expected), 1e-9)


@every_family
def test_integers_lose_little(kind: str) -> None:
    model, ids = model_of(kind), tokens(1, 70)
    cache, theirs = KeepCache(model, 1.0, slot_dtype="int8"), full(model)
    got, expected = (logits(model, ids, each, (60,))[:, 60:] for each in (cache, theirs))
    assert all("Quantized" in type(layer.slots.keys).__name__ for layer in cache.keep_layers)
    close(got, expected, 0.05)


@every_family
def test_a_smaller_cache_loses_more_and_the_repetition_works(kind: str) -> None:
    model, ids = model_of(kind), tokens(1, 110)
    theirs = full(model)
    expected = logits(model, ids, theirs, (100,))[:, 100:]
    for method in ("keepkv", "kvzip"):
        errors = []
        for budget in (12, 80):
            cache = KeepCache(model, budget, method, slot_dtype="float").read(model, ids[:, :100], repeat=ids[:, :3])
            errors.append(float((logits(model, ids[:, 100:], cache) - expected).norm() / expected.norm()))
        assert errors[1] < errors[0]


@pytest.mark.parametrize("kind", SHARED)
def test_keys_that_layers_share_are_compressed_once_for_all_of_them(kind: str) -> None:
    """The queries of every layer that uses them are observed: what they attend to is the sum of what transformers computes."""
    model, ids = model_of(kind), tokens(1, 50)
    cache = KeepCache(model, method="h2o", auto=False)
    logits(model, ids, cache)
    config = model.config.get_text_config(decoder=True)
    before, config._attn_implementation = config._attn_implementation, "eager"
    weights = model(ids, output_attentions=True).attentions
    config._attn_implementation = before
    (layer,), (seen,) = cache.keep_layers, cache.observations()
    index = cache.layers.index(layer)
    users = [
        index,
        *(
            i
            for i, mode in enumerate(config.kv_sharing_modes)
            if mode == "reuse" and config.layer_types[i] == config.layer_types[index]
        ),
    ]
    assert layer.users == len(users) > 1
    group = config.num_attention_heads // layer.heads
    assert seen.queries.shape[1] == len(users) * group
    of_users = torch.stack([weights[i][0].unflatten(0, (layer.heads, -1)) for i in users], 1).flatten(
        1, 2
    )  # [H, users × G, T, T]
    torch.testing.assert_close(seen.column_mass.double(), of_users.double().sum(2).mean(1), rtol=1e-3, atol=1e-4)
    assert seen.projection.shape[:2] == of_users.shape[:2]
    logits(model, ids[:, :20], small := KeepCache(model, 8))
    assert all(
        not other_layers.tensors(other)
        for other in small.layers[max(users[0], 1) + 1 :]
        if other is not layer and other.keys is None
    )


@pytest.mark.parametrize("kind", SHARED)
def test_layers_that_share_keys_may_ask_only_for_the_last_token(kind: str) -> None:
    """As `generate` has some models do. The logits are the same, before and after a compression; `read` sees all queries."""
    model, ids = model_of(kind), tokens(1, 70)
    whole, last = KeepCache(model, auto=False), KeepCache(model, auto=False)
    expected = model(ids[:, :60], past_key_values=whole).logits[:, -1:]
    close(model(ids[:, :60], past_key_values=last, logits_to_keep=1).logits, expected, 1e-6)
    shapes = [cache.observations()[0].queries.shape for cache in (whole, last)]
    assert shapes[0] == shapes[1]
    last.compress("25%")  # from what it has observed
    whole.compress("25%")
    twin = whole.fork()
    expected = model(ids[:, 60:], past_key_values=whole).logits[:, -1:]
    close(model(ids[:, 60:], past_key_values=twin, logits_to_keep=1).logits, expected, 1e-6)
    asked = KeepCache(model, auto=False).read(model, ids)
    seen = KeepCache(model, auto=False)
    logits(model, ids, seen)
    assert torch.equal(asked.observations()[0].queries, seen.observations()[0].queries)


@pytest.mark.parametrize("kind", STATES)
def test_texts_of_models_with_a_state_cannot_be_joined(kind: str) -> None:
    model = model_of(kind)
    caches = [KeepCache(model, auto=False) for _ in range(2)]
    for cache in caches:
        logits(model, tokens(1, 30), cache)
    with pytest.raises(InputError, match="the states of two texts cannot be joined"):
        join(model, caches, [0, 0])


@every_family
def test_a_pass_that_is_too_long_changes_nothing(kind: str) -> None:
    model, ids = model_of(kind), tokens(1, 70)
    cache = KeepCache(model, 1.0, chunk=30)
    logits(model, ids[:, :20], cache)
    twin = cache.fork()
    with pytest.raises(KeepKVError, match="more than chunk=30"):
        logits(model, ids[:, 20:60], cache)
    assert torch.equal(later(model, ids[:, 60:], cache), later(model, ids[:, 60:], twin))


@every_family
def test_resetting_forgets_everything(kind: str) -> None:
    model, ids = model_of(kind), tokens(1, 50)
    used, new = KeepCache(model, "25%"), KeepCache(model, "25%")
    logits(model, tokens(1, 40, seed=3), used)
    twin = used.fork()
    later(model, ids[:, :4], twin)
    used.reset()
    assert torch.equal(*(logits(model, ids, cache, (40, 41)) for cache in (used, new)))
    assert later(model, ids[:, :4], twin).isfinite().all()


@every_family
def test_looking_back_and_refreshing(kind: str) -> None:
    """Exact keys and values of all the text bring back all that a compression took; tokens are read again on a copy."""
    model, ids = model_of(kind), tokens(1, 70)
    whole = KeepCache(model, auto=False)
    logits(model, ids[:, :60], whole)
    small = whole.fork().compress("25%", slot_dtype="float")
    twin = small.fork()
    expected = later(model, ids[:, 60:64], whole.fork())
    close(later(model, ids[:, 60:64], brought_back(small, [(0, 60)], exact(whole))), expected, 1e-6)
    read = brought_back(small, [(4, 20), (30, 40)], again(model, ids[:, :60]))
    assert all(layer.tail == 26 for layer in read.keep_layers)
    assert later(model, ids[:, 60:64], read).isfinite().all()
    assert torch.equal(later(model, ids[:, 60:64], small), later(model, ids[:, 60:64], twin))
    backed = KeepCache(model, 24, period=16, backing="cpu")
    logits(model, ids, backed, (40, 56))
    assert later(model, ids[:, :4], backed.refresh()).isfinite().all()
