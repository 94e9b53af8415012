"""Joined documents: keys stand where they say, votes carry over, and repairs lead to the full prefill."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from conftest import make_model, tokens
from keepkv import KeepCache
from keepkv.cache.report import held_bytes
from keepkv.documents import identity
from keepkv.documents.document import Document
from keepkv.documents.joining import cachecraft
from keepkv.documents.joining.cacheblend import Text, deviation, fresh, renew
from keepkv.documents.joining.join import join, with_lead
from keepkv.documents.joining.joined import joined
from keepkv.errors import InputError
from keepkv.slots.quantized import SLOT_DTYPES
from keepkv.slots.slots import Slots

LEAD = 5
LENGTHS = (40, 33, 37)


def read(model, ids: torch.Tensor, budget: float = 1.0, method: str = "full") -> KeepCache:
    cache = KeepCache(model, budget, method, auto=False)
    model(ids, past_key_values=cache)
    return cache.compress()


def whole(model, ids: torch.Tensor) -> KeepCache:
    cache = KeepCache(model, auto=False)
    model(ids, past_key_values=cache)
    return cache


def texts() -> list[torch.Tensor]:
    lead = tokens(1, LEAD, seed=99)
    return [torch.cat([lead, tokens(1, length - LEAD, seed=n)], 1) for n, length in enumerate(LENGTHS)]


def documents(model, budget: float = 1.0, method: str = "full") -> list[Document]:
    made = []
    for ids in texts():
        whole = read(model, ids)
        exact = [(layer.keys, layer.values) for layer in whole.keep_layers].__getitem__
        made.append(Document(read(model, ids, budget, method), ids, LEAD, "", "", exact=exact))
    return made


def prompt() -> torch.Tensor:
    first, *others = texts()
    return torch.cat([first, *(ids[:, LEAD:] for ids in others)], 1)


def test_joined_keys_are_those_of_a_reading_at_the_new_place(family: str) -> None:
    model = make_model(family)
    cache = join(model, [read(model, ids) for ids in texts()], [LEAD] * 3)
    assert cache.get_seq_length() == sum(LENGTHS) - 2 * LEAD
    start = 0
    for number, ids in enumerate(texts()):
        shift = start - (LEAD if number else 0)
        there = DynamicCache(config=model.config)
        model(ids, position_ids=torch.arange(ids.shape[1])[None] + shift, past_key_values=there)
        skip = LEAD if number else 0
        for ours, theirs in zip(cache.layers, there.layers, strict=True):
            keys, values = theirs.keys[:, :, skip:], theirs.values[:, :, skip:]
            if ours.is_sliding:
                if number == 2:
                    assert torch.allclose(ours.keys, theirs.keys, atol=1e-5)
                continue
            end = start + keys.shape[2]
            assert torch.allclose(ours.keys[:, :, start:end], keys, atol=1e-5)  # its angles are float32
            assert torch.allclose(ours.values[:, :, start:end], values, atol=1e-5)
        start += ids.shape[1] - skip


def test_a_short_last_text_leaves_older_tokens_in_a_sliding_window() -> None:
    model = make_model("gemma3")
    parts = [read(model, tokens(1, length, seed=length)) for length in (40, 12, 9)]
    cache = join(model, parts, [LEAD] * 3)
    window = cache.layers[0]
    assert window.keys.shape[2] == window.sliding_window - 1
    lengths = [part.layers[0].values[:, :, max(0, LEAD - 17) :] for part in parts]
    newest = torch.cat([lengths[0], parts[1].layers[0].values[:, :, LEAD:], parts[2].layers[0].values[:, :, LEAD:]], 2)
    assert torch.equal(window.values, newest[:, :, 1 - window.sliding_window :])
    model(tokens(1, 4, seed=7), past_key_values=cache)


@pytest.mark.parametrize("method", ["keepkv", "snapkv", "minicache"])
def test_compressed_texts_keep_their_votes_and_attend_as_one_softmax(method: str) -> None:
    model = make_model("llama", num_hidden_layers=4)
    parts = [read(model, ids, 0.4, method) for ids in texts()]
    cache = join(model, parts, [LEAD] * 3)
    later = tokens(1, 3, seed=5)
    assert torch.isfinite(model(later, past_key_values=cache.fork()).logits).all()
    for layer, *old in zip(cache.keep_layers, *(part.keep_layers for part in parts), strict=True):
        positions = torch.split(layer.slots.positions, layer.slots.counts)
        assert all(bool((p.diff() > 0).all()) for p in positions)
        kept = [o.slots.bias[o.slots.positions >= LEAD] for o in old]
        assert torch.equal(layer.slots.bias[layer.slots.positions >= LEAD].sort().values, torch.cat(kept).sort().values)
    assert cache.report().tokens == (sum(LENGTHS) - 2 * LEAD,)


def test_the_lead_counts_once_and_its_votes_add_up() -> None:
    """Two slots of one key, p and q votes, one of each its own token: to any query one slot of p + q - 1 votes."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(7, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    first = Slots(keys[:5], values[:5], torch.tensor([3.0, 0.5, 0, 1, 0]), torch.tensor([0, 2, 7, 3, 9]).int(), (0, 3, 5))
    lead_keys = torch.cat([keys[:1], keys[5:6], keys[6:]])  # position 0 in both, 1 and 2 only in the other text
    lead = Slots(lead_keys, values[4:], torch.tensor([2.0, 0.7, -1.0]), torch.tensor([0, 1, 2]).int(), (0, 2, 3))
    made = with_lead(first, lead)
    assert made.counts == [4, 3]
    assert made.positions.tolist() == [0, 1, 2, 7, 2, 3, 9]
    votes = made.bias.double().exp()
    assert votes[0] == pytest.approx(math.exp(3) + math.exp(2) - 1, rel=1e-6)
    mean = (math.exp(3) * values[0] + (math.exp(2) - 1) * values[4]) / (math.exp(3) + math.exp(2) - 1)
    assert torch.allclose(made.values[0], mean)
    assert torch.equal(made.values[1], values[5])
    assert torch.equal(made.bias[[1, 2, 3, 4]], torch.tensor([0.7, 0.5, 0, -1.0]))
    assert with_lead(first, None) is first


def test_one_document_joined_is_itself(family: str) -> None:
    model = make_model(family, torch.float32)
    cache = read(model, texts()[0], 0.5, "keepkv")
    later = tokens(1, 6, seed=3)
    ours = model(later, past_key_values=join(model, [cache], [LEAD])).logits
    assert torch.equal(ours, model(later, past_key_values=cache.fork()).logits)


def test_a_tail_of_an_earlier_text_becomes_slots_of_one_vote() -> None:
    model = make_model()
    first, second = (read(model, ids, 0.5, "snapkv") for ids in texts()[:2])
    more = tokens(1, 6, seed=8)
    model(more, past_key_values=first)
    model(more, past_key_values=second)
    cache = join(model, [first, second], [LEAD, LEAD])
    assert cache.keep_layers[0].tail == 6
    assert cache.get_seq_length() == LENGTHS[0] + 6 + LENGTHS[1] - LEAD + 6
    one, two = (split(part.keep_layers[0].slots) for part in (first, second))
    expected = [{*a.tolist(), *range(40, 46), *(p for p in b.tolist() if p < LEAD)} for a, b in zip(one, two, strict=True)]
    moved = [{p + 46 - LEAD for p in b.tolist() if p >= LEAD} for b in two]
    held = split(cache.keep_layers[0].slots)
    assert [set(p.tolist()) for p in held] == [a | b for a, b in zip(expected, moved, strict=True)]


def split(slots: Slots) -> tuple[torch.Tensor, ...]:
    return torch.split(slots.positions, slots.counts)


@pytest.mark.parametrize("repair", [0.0, 0.3])
def test_quantised_documents_stay_quantised(repair: float) -> None:
    model = make_model("llama", torch.float32)
    parts = documents(model, 0.5, "snapkv")
    small = [replace(part, cache=whole(model, part.ids).compress(0.5, "snapkv", slot_dtype="int8")) for part in parts]
    plain, eight = joined(model, parts, repair).cache, joined(model, small, repair).cache
    assert eight.report().slot_dtype == "int8"
    for layer, exact in zip(eight.keep_layers, plain.keep_layers, strict=True):
        assert held_bytes(layer.slots.tensors) == len(layer.slots.keys) * layer.slot_bytes(SLOT_DTYPES["int8"])
        assert len(layer.slots.keys) == len(exact.slots.keys)
        if not repair:
            torch.testing.assert_close(layer.slots.keys[:], exact.slots.keys, atol=0.05, rtol=0)
    mixed = joined(model, [small[0], parts[1]]).cache
    assert mixed.report().slot_dtype == "float"


@pytest.mark.parametrize("variant", ["repository", "paper"])
def test_reading_everything_again_is_the_full_prefill(family: str, variant: str) -> None:
    model = make_model(family)
    if family == "gemma3":
        with pytest.raises(InputError, match="sliding windows"):
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
        text = Text(ids, lambda i, exact=exact: tuple(x[:, :, LEAD:] for x in (exact.layers[i].keys, exact.layers[i].values)))
        made.append(renew(model, before, text, 0.1, chosen=chosen))
    for a, b in zip(made[0].keys + made[0].values, made[1].keys + made[1].values, strict=True):
        assert torch.equal(a, b)


def test_the_tokens_that_change_most_are_read_again() -> None:
    model = make_model()
    first, second, _ = documents(model)
    ids = second.ids[:, LEAD:]
    old = tuple(x[:, :, LEAD:] for x in second.exact(1))
    text = Text(ids, lambda i: tuple(x[:, :, LEAD:] for x in second.exact(i)))
    new = fresh(model, first.cache, ids)
    there = DynamicCache(config=model.config)
    model(torch.cat([first.ids, ids], 1), past_key_values=there)
    assert torch.allclose(new[1], there.layers[1].values[:, :, first.ids.shape[1] :], atol=1e-9)
    change = deviation(new, old)
    expected = (new[1] - old[1]).square().sum((0, 1, 3)).sqrt()
    assert torch.allclose(change, expected.float(), atol=1e-5)
    made = renew(model, first.cache, text, 0.25)
    assert set(made.tokens.tolist()) == set(change.topk(7).indices.tolist())
    narrowed = renew(model, first.cache, text, 0.25, "paper")
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
        assert sum(map(sum, cache.report().kept[0])) == int(0.4 * total * 6)
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
    made = renew(model, parts[0].cache, Text(parts[1].ids[:, LEAD:], lambda i: tuple(
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
    model.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(InputError, match="change with the length"):
        joined(model, parts)


def test_a_variant_counts_the_attention_it_paid_and_needs_no_repair_where_it_stood() -> None:
    model = make_model()
    parts = documents(model)
    first, second, third = parts
    whole = joined(model, parts[:2], 1.0).cache
    ids = third.ids[:, LEAD:]
    start = whole.get_seq_length()
    stood = cachecraft.observe(model, whole, [LENGTHS[0], start], ["a", "b"], Text(ids, lambda i: (
        third.exact(i)[0][:, :, LEAD:], third.exact(i)[1][:, :, LEAD:])))  # fmt: skip
    assert stood.sizes == (LENGTHS[0], LENGTHS[1] - LEAD)
    assert stood.inter.shape == (3, ids.shape[1], 2)
    assert torch.allclose(stood.inter.sum(-1) + stood.intra, torch.ones(3, ids.shape[1]), atol=1e-5)

    model.set_attn_implementation("eager")  # the same from attention maps
    maps = model(prompt(), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for layer, told in enumerate(maps):
        paid = told[0, :, start:].mean(0)
        assert torch.allclose(stood.inter[layer, :, 0], paid[:, : LENGTHS[0]].sum(-1).float(), atol=1e-4)
        assert torch.allclose(stood.inter[layer, :, 1], paid[:, LENGTHS[0] : start].sum(-1).float(), atol=1e-4)

    assert 0.5 <= stood.impact < 1
    assert stood.overlap(["a", "b"]) == pytest.approx(1)
    assert stood.overhead(["a", "b"]) == pytest.approx(0, abs=1e-12)
    assert stood.overlap(["b", "a"]) == 0  # the other way round
    alone = stood.overlap(["a"])
    assert 0 < alone < 1
    assert stood.overlap(["x", "a"]) == alone
    assert stood.overlap(["x"]) == 0
    assert len(stood.chosen(["x"])) == -int(-stood.impact * ids.shape[1] // 1)
    paid = stood.inter.sum((0, 2))
    assert paid[stood.chosen(["x"])].min() >= paid.sort().values[ids.shape[1] - len(stood.chosen(["x"]))]
    other = cachecraft.observe(
        model, first.cache, [LENGTHS[0]], ["a"], Text(ids, lambda i: tuple(x[:, :, LEAD:] for x in third.exact(i)))
    )
    assert cachecraft.best([stood, other], ["a", "b"]) is stood
    assert cachecraft.best([stood, other], ["a"]) is other

    again = joined(model, parts, 1.0, crafts=[[_behind(model, first, second)], [stood]], keys=["a", "b", "c"]).cache
    later = tokens(1, 4, seed=6)
    theirs = model(torch.cat([prompt(), later], 1)).logits[:, -4:]
    assert torch.allclose(model(later, past_key_values=again).logits, theirs, atol=1e-8)  # nothing was read again


def test_a_variant_comes_back_from_its_file(tmp_path) -> None:
    model = make_model(dtype=torch.float32)
    first, second, _ = documents(model)
    made, known = _behind(model, first, second), identity.of_model(model)
    cachecraft.save(made, tmp_path / "a.variant", known)
    again = cachecraft.load(tmp_path / "a.variant", known)
    assert (again.before, again.sizes, again.start, again.impact) == (made.before, made.sizes, made.start, made.impact)
    assert again.chosen(["x"]).tolist() == made.chosen(["x"]).tolist()
    for part in ("keys", "values", "taken"):
        assert all(map(torch.equal, getattr(again.renewed, part), getattr(made.renewed, part)))
    ours, theirs = (joined(model, [first, second], 1.0, crafts=[[v]], keys=["a", "b"]).cache for v in (made, again))
    later = tokens(1, 4, seed=6)
    assert torch.equal(model(later, past_key_values=ours).logits, model(later, past_key_values=theirs).logits)
    with pytest.raises(InputError, match="other weights"):
        cachecraft.load(tmp_path / "a.variant", identity.of_model(make_model(dtype=torch.float32, seed=4)))
    (tmp_path / "b.variant").write_bytes((tmp_path / "a.variant").read_bytes()[:-1])
    with pytest.raises(InputError, match="not a whole"):
        cachecraft.load(tmp_path / "b.variant", known)


def _behind(model, first: Document, second: Document) -> cachecraft.Variant:
    return cachecraft.observe(model, first.cache, [LENGTHS[0]], ["a"], Text(second.ids[:, LEAD:], lambda i: (
        second.exact(i)[0][:, :, LEAD:], second.exact(i)[1][:, :, LEAD:])))  # fmt: skip
