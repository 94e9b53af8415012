"""Quantized slots: what is stored, what is read, and that everything else works as with plain ones."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch

from attend.truth import COUNTS, expected, randn, slots_of
from helpers import EVERYTHING, make_model, tokens
from keepkv import InputError, KeepCache, KeepKVError
from keepkv.attend.dispatch import attend, attend_slots
from keepkv.cache.report import held_bytes
from keepkv.methods import METHODS
from keepkv.slots.quantized import SLOT_DTYPES, Quantized, hadamard
from keepkv.slots.slots import Slots

QUANTIZED = ["int8", "int4"]
SIZES = [64, 96, 24, 7, 1]


def quantized(slots: Slots, name: str) -> Slots:
    slot_dtype = SLOT_DTYPES[name]
    return Slots(slot_dtype.store(slots.keys), slot_dtype.store(slots.values), slots.bias, slots.positions, slots.offsets)


# --- the stack of vectors ---


@pytest.mark.parametrize("size", SIZES)
def test_the_turn_is_orthogonal_and_spreads_every_channel(size: int) -> None:
    turn = hadamard(size, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(turn @ turn.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14)
    block = size & -size
    torch.testing.assert_close(turn.abs().amax(), torch.tensor(block**-0.5, dtype=torch.float64))
    assert (turn != 0).sum() == size * block


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("level", [1e-20, 1.0, 1e20])
def test_no_number_is_wrong_by_more_than_its_bound(name: str, size: int, level: float) -> None:
    """In the turned space: half a step, and for the largest what rounding the step takes off."""
    slot_dtype, vectors = SLOT_DTYPES[name], randn(200, size) * level
    vectors[3] = 0
    vectors[4, 1:] = 0  # an outlier
    stack = slot_dtype.store(vectors)
    turn = hadamard(size, torch.float64, vectors.device)
    wrong, largest = ((stack[:] - vectors) @ turn.T).abs(), (vectors @ turn.T).abs().amax(1, keepdim=True)
    step = 2 * largest / (2**slot_dtype.bits - 1)
    assert (wrong <= step / 2 * (1 + 2**-7) + largest / 512).all()
    assert torch.equal(stack[3:4], torch.zeros(1, size, dtype=torch.float64))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("size", SIZES)
def test_it_stores_what_it_says(name: str, size: int) -> None:
    slot_dtype = SLOT_DTYPES[name]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        stack = slot_dtype.store(randn(100, size, dtype=dtype))
        assert stack[:].dtype == stack.dtype == dtype
        assert (
            held_bytes(stack.tensors)
            == 100 * slot_dtype.bytes(size, dtype.itemsize)
            == 100 * (-(-size * slot_dtype.bits // 8) + 2)
        )


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("size", SIZES)
def test_what_was_read_is_stored_as_it_was(name: str, size: int) -> None:
    """So that an entry that many folds leave alone does not wander."""
    for dtype in (torch.float32, torch.float64):
        once = SLOT_DTYPES[name].store(randn(500, size, dtype=dtype))
        again = SLOT_DTYPES[name].store(once[:])
        assert all(map(torch.equal, once.tensors, again.tensors))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("size", [64, 7])
def test_cutting_and_joining_are_those_of_tensors(name: str, size: int) -> None:
    stack = SLOT_DTYPES[name].store(randn(50, size))
    plain, index = stack[:], torch.tensor([[3, 0], [49, 3]])
    assert stack.shape == plain.shape
    assert len(stack) == 50
    close = partial(torch.testing.assert_close, rtol=1e-13, atol=1e-13)  # matrix products round by their shape
    close(stack[index], plain[index])
    for lo, hi in ((0, 50), (7, 19), (50, 50)):
        close(stack[lo:hi], plain[lo:hi])
        assert held_bytes(stack.cut(lo, hi).tensors) == held_bytes(stack.tensors)  # nothing is copied
    joined = Quantized.cat([stack.cut(40, 50), stack.cut(0, 3)])
    close(joined[:], torch.cat([plain[40:], plain[:3]]))


@pytest.mark.parametrize("name", QUANTIZED)
def test_rows_and_newest_off_are_those_of_what_is_read(name: str) -> None:
    slots, some = quantized(slots_of(COUNTS), name), quantized(slots_of([9, 4]), name)
    pairs = [
        (slots.rows([1, 0, 1], 3), slots.read().rows([1, 0, 1], 3)),
        (some.newest_off(2), some.read().newest_off(2)),
        (some.to(torch.device("cpu")), some.read()),
    ]
    for ours, theirs in pairs:
        assert ours.offsets == theirs.offsets
        torch.testing.assert_close(ours.read().tensors, theirs.tensors, rtol=1e-13, atol=1e-13)


# --- attention ---


@pytest.mark.filterwarnings("ignore:attention over compressed slots runs on the slow backend")
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize(("size", "value_size"), [(16, 24), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_is_attention_over_what_is_read(name: str, rows: int, size: int, value_size: int, dtype: torch.dtype) -> None:
    slots = quantized(slots_of(COUNTS, size, value_size, dtype), name)
    query, keys, values = randn(2, 3, rows, size, dtype=dtype), *(
        randn(2, 3, 9, n, dtype=dtype, seed=n) for n in (size, value_size)
    )  # fmt: skip
    truth = expected(query, slots.read(), keys, values, torch.ones(2, 1, rows, 9, dtype=torch.bool), 0.2)
    atol = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 0.03}[dtype]
    got = attend(query, slots, keys, values, None, 0.2)
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=atol)
    alone = attend_slots(query, slots, 0.2)
    for ours, theirs in zip(alone, attend_slots(query, slots.read(), 0.2), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_output_is_off_by_what_rounding_allows(name: str) -> None:
    """|o' - o| <= max |v' - v| + 2 tanh(h/2) max |v|, h the largest change of a logit: in float64, head by head."""
    slots, query = slots_of([60, 300], 64, 64), randn(1, 2, 40, 64)
    rounded = quantized(slots, name)
    ours, theirs = attend_slots(query, rounded, 0.125)[0], attend_slots(query, slots, 0.125)[0]
    for head, (lo, hi) in enumerate(zip(slots.offsets, slots.offsets[1:], strict=False)):
        change = 0.125 * (query[0, head] @ (rounded.keys[lo:hi] - slots.keys[lo:hi]).T).abs().amax(1)
        values = (rounded.values[lo:hi] - slots.values[lo:hi]).norm(dim=1).max()
        bound = values + 2 * (change / 2).tanh() * slots.values[lo:hi].norm(dim=1).max()
        assert ((ours - theirs)[0, head].norm(dim=1) <= bound).all()
        assert float(values) < (0.5 if name == "int8" else 4) / 16 * float(slots.values[lo:hi].norm(dim=1).max())


# --- the cache ---


@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes_are_those_of_the_format(name: str, family: str) -> None:
    """A tenth of the slots of a 16-bit cache, in 8 or 4 bits: 1/20 or 1/40 of it, but for 2 steps, vote and position a slot."""
    model, length = make_model(family, torch.bfloat16), 400
    cache = KeepCache(model, 0.1, "streaming", slot_dtype=name)
    model(tokens(1, length), past_key_values=cache)
    report, layers = cache.report(), cache.keep_layers
    held = held_bytes(x for layer in layers for x in layer.slots.tensors)
    slots = sum(sum(layer) for layer in report.kept[0])
    assert report.slot_dtype == name
    assert held == slots * layers[0].slot_bytes(SLOT_DTYPES[name])
    full = sum(2 * 2 * layer.heads * length * layer.keys.shape[3] for layer in layers)
    assert held - slots * (2 * 2 + 8) <= 0.1 * full * SLOT_DTYPES[name].bits / 16
    assert report.kv_bytes <= held + report.kv_bytes_full - full  # beside it, sliding windows


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_budget_in_bytes_buys_more_slots(name: str) -> None:
    model, ids, budget = make_model("llama", torch.float32), tokens(1, 400), "60KB"
    plain, small = (KeepCache(model, budget, "snapkv", slot_dtype=kind) for kind in ("float", name))
    for cache in (plain, small):
        model(ids, past_key_values=cache)
        assert 59_000 <= held_bytes(x for layer in cache.keep_layers for x in layer.slots.tensors) <= 60_000
    sizes = [cache.keep_layers[0].slot_bytes(cache.policy.stored_as) for cache in (plain, small)]
    assert small.report().slots_per_head == pytest.approx(plain.report().slots_per_head * sizes[0] / sizes[1], rel=0.05)


@pytest.mark.parametrize("name", QUANTIZED)
def test_nothing_that_was_read_is_kept(name: str) -> None:
    model = make_model("llama", torch.float32)
    cache = KeepCache(model, 0.5, "snapkv", slot_dtype=name)
    model(tokens(1, 60), past_key_values=cache)
    gc.collect()
    before = {id(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
    for new in (1, 1, 20, 1):
        model(tokens(1, new, seed=2), past_key_values=cache)
    gc.collect()
    after = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and id(x) not in before]
    assert after
    of_slots = {id(x) for layer in cache.keep_layers for x in (layer.keys, layer.values, layer.slots.bounds)}
    assert all(id(x) in of_slots or x.shape == (16, 16) for x in after)  # the tail, and the Hadamard matrix


@pytest.mark.parametrize("budget", ["100%", "5000", "40KB"])
def test_a_budget_of_all_tokens_still_rounds(budget: str) -> None:
    """So that a budget in bytes that holds all tokens only when they are quantized is kept."""
    model, ids = make_model("llama", torch.float32), tokens(1, 60)
    cache = KeepCache(model, budget, slot_dtype="int4")
    model(ids, past_key_values=cache)
    assert cache.keep_layers[0].tail == 0
    assert cache.report().slots_per_head == 60
    assert cache.report().kv_bytes == 60 * 6 * (2 * (8 + 2) + 8) < 40_000 < cache.report().kv_bytes_full


def test_the_method_full_stays_exact() -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, 40)
    cache = KeepCache(model, 0.5, "full", slot_dtype="int4")
    model(ids, past_key_values=cache)
    assert cache.keep_layers[0].slots is None
    assert cache.report().slot_dtype == "float"


@pytest.mark.parametrize("method", ["keepkv", "snapkv", "keepkv-paper", "cam", "attention-matching", "chelsea"])
def test_int8_is_close_to_plain_slots(method: str, family: str) -> None:
    model, ids = make_model(family, torch.float64), tokens(1, 200)
    later = tokens(1, 6, seed=1)
    whole = KeepCache(model, auto=False, column_mass=True)
    model(ids, past_key_values=whole)
    whole.repeat(model, ids, how=METHODS[method].repeat)
    plain, int8, int4 = (whole.fork().compress(0.3, method, slot_dtype=name) for name in ("float", "int8", "int4"))
    theirs = model(later, past_key_values=plain).logits.softmax(-1)
    near, far = ((model(later, past_key_values=each).logits.softmax(-1) - theirs).abs().max() for each in (int8, int4))
    assert near < 0.1
    assert near < far


def test_the_fit_knows_that_keys_are_rounded() -> None:
    """Votes and values fitted to the keys that are read lose less on held-out queries than to those that were there."""
    model, ids = make_model("llama", torch.float32, seed=3), tokens(1, 460, seed=2)
    whole = KeepCache(model, auto=False)
    model(ids[:, :400], past_key_values=whole)
    full = model(ids[:, 400:], past_key_values=whole.fork().compress("100%")).logits.double().log_softmax(-1)

    def kl(cache: KeepCache) -> float:
        ours = model(ids[:, 400:], past_key_values=cache.fork()).logits.double().log_softmax(-1)
        return float((full.exp() * (full - ours)).sum(-1).mean())

    aware, after = whole.fork().compress(0.15, slot_dtype="int4"), whole.fork().compress(0.15)
    for layer in after.keep_layers:
        layer.slots = quantized(layer.slots, "int4")
    assert kl(aware) < kl(after)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("tail", [0, 5])
def test_folds_that_keep_everything_do_not_wander(name: str, tail: int) -> None:
    """What has been rounded is not rounded again: every slot is its token's key, rounded once, after any number of folds."""
    model, ids = make_model("llama", torch.float32), tokens(1, 120, seed=1)
    cache, exact = KeepCache(model, 0.9, EVERYTHING, period=7, tail=tail, slot_dtype=name), KeepCache(model, auto=False)
    model(ids[:, :50], past_key_values=cache)
    first = cache.keep_layers[0].slots
    model(ids[:, :50], past_key_values=exact)
    for i in range(50, 120):
        model(ids[:, i : i + 1], past_key_values=cache)
    assert cache.report().compressions > 4
    layer, slot_dtype = cache.keep_layers[0], SLOT_DTYPES[name]
    n = 50 - tail
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(first.keys[:n], slot_dtype.round(exact.keep_layers[0].keys[0, 0, :n]))
    for ours, theirs in ((layer.slots.keys, first.keys), (layer.slots.values, first.values)):
        assert all(torch.equal(x[:n], y[:n]) for x, y in zip(ours.tensors, theirs.tensors, strict=True))
    assert held_bytes(layer.slots.tensors) == len(layer.slots.keys) * layer.slot_bytes(slot_dtype)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_live_cache_folds_within_its_bytes(name: str) -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, 300, seed=1)
    cache = KeepCache(model, 30, chunk=64, period=20, slot_dtype=name)
    cache.read(model, ids[:, :200])
    for i in range(200, 290):
        assert model(ids[:, i : i + 1], past_key_values=cache).logits.isfinite().all()
        layer = cache.keep_layers[0]
        most = 6 * (30 * layer.slot_bytes(SLOT_DTYPES[name]) + 20 * layer.slot_bytes())
        assert cache.report().kv_bytes <= most
    branch = cache.fork()
    branch.crop(-(branch.keep_layers[0].tail // 2))
    assert branch.get_seq_length() < cache.get_seq_length()


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_padded_batch_is_row_by_row_what_each_is_alone(name: str) -> None:
    model, ids = make_model("llama", torch.float64), tokens(2, 80)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    options = {"max_new_tokens": 30, "do_sample": False}

    def cache() -> KeepCache:
        return KeepCache(model, 0.3, period=12, slot_dtype=name)

    both = model.generate(ids, attention_mask=mask, past_key_values=cache(), **options)
    for row, start in ((0, 0), (1, 30)):
        alone = model.generate(ids[row : row + 1, start:], past_key_values=cache(), **options)
        assert torch.equal(both[row, 80:], alone[0, 80 - start :])


def test_beams_take_their_rows_with_them() -> None:
    model, ids = make_model("llama", torch.float32), tokens(2, 60)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    exact = model.generate(ids, past_key_values=KeepCache(model, "100%", slot_dtype="int8"), **options)
    assert exact.shape[1] == 68
    cache = KeepCache(model, 0.5, "snapkv", slot_dtype="int4")
    model(ids, past_key_values=cache)
    before = cache.keep_layers[1].slots
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    torch.testing.assert_close(cache.keep_layers[1].slots.keys[:], before.read().rows([1, 1, 0], 2).keys)


def test_what_cannot_be_is_refused() -> None:
    model = make_model()
    with pytest.raises(InputError, match="did you mean 'int8'"):
        KeepCache(model, slot_dtype="int")
    cache = KeepCache(model, 0.5, auto=False)
    model(tokens(1, 60), past_key_values=cache)
    with pytest.raises(InputError, match="known: float, int8, int4"):
        cache.compress(slot_dtype="nf")
    with pytest.raises(KeepKVError, match="minicache stores the slots of two layers together"):
        cache.compress(0.5, "minicache", slot_dtype="int8")
    assert not cache.compressed
    assert cache.policy.slot_dtype.name == "float"
