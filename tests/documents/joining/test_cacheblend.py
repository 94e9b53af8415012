"""CacheBlend's repairs lead to the full prefill."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from documents.joining.texts import LEAD, LENGTHS, documents, prompt, read, whole
from helpers import make_model, tokens
from keepkv import KeepCache
from keepkv.cache.report import held_bytes
from keepkv.documents.joining.cacheblend import ReusedText, deviation, fresh, recompute
from keepkv.documents.joining.join import join
from keepkv.documents.joining.joined import joined
from keepkv.errors import InputError
from keepkv.slots.slot_dtype import SLOT_DTYPES


@pytest.mark.parametrize("repair", [0.0, 0.3])
def test_quantized_documents_stay_quantized(repair: float) -> None:
    model = make_model("llama", torch.float32)
    parts = documents(model, 20, "snapkv")
    small = [replace(part, cache=whole(model, part.ids).compress(20, "snapkv", slot_dtype="int8")) for part in parts]
    plain, eight = joined(model, parts, repair).cache, joined(model, small, repair).cache
    assert eight.report().slot_dtype == "int8"
    for layer, exact in zip(eight.keep_layers, plain.keep_layers, strict=True):
        price = layer.price(SLOT_DTYPES["int8"])
        assert held_bytes(layer.slots.tensors) <= len(layer.slots.keys) * price.slot + len(layer.slots.counts) * price.head
        assert len(layer.slots.keys) == len(exact.slots.keys)
        if not repair:
            torch.testing.assert_close(layer.slots.keys[:], exact.slots.keys, atol=0.05, rtol=0)


@pytest.mark.parametrize("repair", [0.0, 0.3])
def test_documents_of_different_formats_take_the_finest(repair: float) -> None:
    """No slot is rounded more than it was; a document that was left whole is exact."""
    model = make_model("llama", torch.float32)
    parts = [*documents(model, 20, "snapkv")[:2], documents(model)[2]]
    order = ["float", "bfloat16", "int8", "int4", "int2"]
    for names in (("int4", "int8"), ("int2", "int4"), ("int8", "bfloat16"), ("float", "int4"), ("int4", "int8", "float")):
        own = [
            replace(part, cache=part.cache if number == 2 else whole(model, part.ids).compress(20, "snapkv", slot_dtype=name))
            for number, (part, name) in enumerate(zip(parts, names, strict=False))
        ]
        both, exact = joined(model, own, repair).cache, joined(model, parts[: len(names)], repair).cache
        finest = min(names, key=order.index)
        assert both.report().slot_dtype == finest
        for layer, plain in zip(both.keep_layers, exact.keep_layers, strict=True):
            assert torch.equal(layer.slots.positions, plain.slots.positions)
            price = layer.price(SLOT_DTYPES[finest])
            assert held_bytes(layer.slots.tensors) <= len(layer.slots.keys) * price.slot + len(layer.slots.counts) * price.head
        assert model(tokens(1, 4, seed=6), past_key_values=both).logits.isfinite().all()


def test_documents_that_are_compressed_together_say_how_they_are_stored() -> None:
    """By default as everything else: in integers, whatever the documents, which were whole, said."""
    model = make_model("llama", torch.float32)
    cache = joined(model, documents(model, slot_dtype="auto"), 0.5, budget=0.3).cache
    report = cache.report()
    assert report.slot_dtype in ("int8", "int4")
    assert not isinstance(cache.keep_layers[0].slots.keys, torch.Tensor)
    assert report.kv_bytes <= 0.3 * report.kv_bytes_full


@pytest.mark.parametrize("variant", ["repository", "paper"])
def test_reading_everything_again_is_the_full_prefill(family: str, variant: str) -> None:
    model = make_model(family)
    if family == "gemma3":
        with pytest.raises(InputError, match="not every layer of this model has full attention"):
            joined(model, documents(model), 1.0)
        return
    cache = joined(model, documents(model), 1.0, variant=variant).cache
    later = tokens(1, 4, seed=6)
    ours = model(later, past_key_values=cache).logits
    theirs = model(torch.cat([prompt(), later], 1)).logits[:, -4:]
    assert torch.allclose(ours, theirs, atol=1e-8)


@pytest.mark.parametrize("variant", ["repository", "paper"])
def test_repairing_some_tokens_helps(variant: str) -> None:
    model = make_model("llama", num_hidden_layers=4)
    later = tokens(1, 8, seed=6)
    full = model(torch.cat([prompt(), later], 1)).logits[:, -8:].log_softmax(-1)
    losses = []
    for share in (0.0, 0.3, 0.7, 1.0):
        cache = joined(model, documents(model), share, variant=variant).cache
        ours = model(later, past_key_values=cache).logits.log_softmax(-1)
        losses.append(float((full.exp() * (full - ours)).sum(-1).mean()))
    assert losses[0] > losses[2] > losses[3]
    assert losses[3] < 1e-8


def test_no_token_sees_what_comes_after_it() -> None:
    model = make_model()
    first, second, _ = documents(model)
    before = first.cache
    chosen = torch.tensor([3, 8, 20])
    made = []
    for changed in (False, True):
        ids = second.ids[:, LEAD:].clone()
        if changed:
            ids[0, 21:] = 7
        exact = read(model, torch.cat([second.ids[:, :LEAD], ids], 1))
        text = ReusedText(
            ids, lambda i, exact=exact: tuple(x[:, :, LEAD:] for x in (exact.layers[i].keys, exact.layers[i].values))
        )
        made.append(recompute(model, before, text, 0.1, chosen=chosen))
    for a, b in zip(made[0].keys + made[0].values, made[1].keys + made[1].values, strict=True):
        assert torch.equal(a, b)


def test_the_tokens_that_change_most_are_read_again() -> None:
    model = make_model()
    first, second, _ = documents(model)
    ids = second.ids[:, LEAD:]
    old = tuple(x[:, :, LEAD:] for x in second.exact(1))
    text = ReusedText(ids, lambda i: tuple(x[:, :, LEAD:] for x in second.exact(i)))
    new = fresh(model, first.cache, ids)
    there = DynamicCache(config=model.config)
    model(torch.cat([first.ids, ids], 1), past_key_values=there)
    assert torch.allclose(new[1], there.layers[1].values[:, :, first.ids.shape[1] :], atol=1e-9)
    change = deviation(new, old)
    expected = (new[1] - old[1]).square().sum((0, 1, 3)).sqrt()
    assert torch.allclose(change, expected.float(), atol=1e-5)
    made = recompute(model, first.cache, text, 0.25)
    assert set(made.tokens.tolist()) == set(change.topk(7).indices.tolist())
    narrowed = recompute(model, first.cache, text, 0.25, "paper")
    counts = [int(taken.sum()) for taken in narrowed.taken]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == len(narrowed.tokens) > counts[-1] == 4


def test_slots_of_repaired_tokens_take_the_fresh_key_and_the_change_of_the_value() -> None:
    model = make_model()
    parts = documents(model, 0.4, "keepkv")[:2]
    plain, mended = joined(model, parts).cache, joined(model, parts, 0.5).cache
    inside = 0
    for index, (a, b) in enumerate(zip(plain.keep_layers, mended.keep_layers, strict=True)):
        assert torch.equal(a.slots.positions, b.slots.positions)
        assert torch.equal(a.slots.bias, b.slots.bias)
        earlier = (a.slots.positions < LENGTHS[0]) & (a.slots.positions >= LEAD)
        assert torch.equal(a.slots.keys[earlier], b.slots.keys[earlier])
        moved = (a.slots.values != b.slots.values).any(1)
        inside += int(moved.sum())
        if index == 0:  # the first layer's keys and values depend on the token alone
            assert torch.allclose(a.slots.keys, b.slots.keys, atol=1e-5)
    assert inside


def test_repaired_documents_can_be_compressed_together() -> None:
    """Their queries are those that were asked when they were read again, at their true places."""
    model = make_model()
    later = tokens(1, 8, seed=6)
    full = model(torch.cat([prompt(), later], 1)).logits[:, -8:].log_softmax(-1)
    whole = joined(model, documents(model), 1.0).cache
    total = whole.get_seq_length()
    kept = joined(model, documents(model), 1.0, budget=1.0).cache
    assert torch.equal(model(later, past_key_values=whole).logits, model(later, past_key_values=kept).logits)
    losses = {}
    for method in ("keepkv", "snapkv", "random"):
        cache = joined(model, documents(model), 0.5, budget=0.4, method=method).cache
        assert sum(map(sum, cache.report().kept[0])) == int(0.4 * total * 6 * 256 / 264)
        assert cache.get_seq_length() == total
        ours = model(later, past_key_values=cache).logits.log_softmax(-1)
        losses[method] = float((full.exp() * (full - ours)).sum(-1).mean())
    assert losses["keepkv"] < losses["random"]
    with pytest.raises(InputError, match="were repaired"):
        joined(model, documents(model), budget=0.4)
    with pytest.raises(InputError, match="not compressed"):
        joined(model, documents(model, 0.5, "snapkv"), 0.5, budget=0.4)


def test_queries_of_repaired_tokens_are_those_of_the_prompt() -> None:
    model = make_model()
    parts = documents(model)[:2]
    made = recompute(model, parts[0].cache, ReusedText(parts[1].ids[:, LEAD:], lambda i: tuple(
        x[:, :, LEAD:] for x in parts[1].exact(i))), 1.0)  # fmt: skip
    cache = KeepCache(model, 1.0, "full", auto=False)
    model(torch.cat([parts[0].ids, parts[1].ids[:, LEAD:]], 1), past_key_values=cache)
    for layer, asked in zip(cache.keep_layers, made.queries, strict=True):
        seen = layer.watch.banked(layer.state).banks[0].queries[:, :, LENGTHS[0] :]
        assert torch.allclose(asked[0].reshape(seen.shape), seen, atol=1e-9)
        assert made.scale == layer.watch.scale


def test_what_cannot_be_joined_or_repaired_is_refused() -> None:
    model = make_model()
    parts = documents(model, 0.4, "keepkv")
    from dataclasses import replace

    with pytest.raises(InputError, match="--exact"):
        joined(model, [parts[0], replace(parts[1], exact=None)], 0.2)
    with pytest.raises(InputError, match="no text of its own"):
        join(model, [parts[0].cache, parts[1].cache], [LEAD, 33])
    changing = make_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    for repair in (0.0, 0.2):
        with pytest.raises(InputError, match="change with the length"):
            joined(changing, documents(changing, 0.4, "keepkv"), repair)
