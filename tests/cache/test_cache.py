"""KeepCache on tiny random models of every family: what must always hold."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

from helpers import make_model, read, stored, tokens
from keepkv import BudgetError, KeepCache, KeepKVError, Method, ModelError, methods, score
from keepkv.cache.layer import KeepLayer
from keepkv.methods import METHODS

LENGTH = 120


@pytest.mark.parametrize("budget", [1.0, "100%", "5000", "1GB"])
def test_a_budget_of_all_tokens_is_bit_identical(family: str, budget: str | float) -> None:
    model, ids = make_model(family, torch.float32), tokens(2, LENGTH)
    ours, theirs = KeepCache(model, budget), DynamicCache(config=model.config)
    for lo, hi in ((0, 90), (90, 91), (91, 92), (92, LENGTH)):
        got = model(ids[:, lo:hi], past_key_values=ours).logits
        assert torch.equal(got, model(ids[:, lo:hi], past_key_values=theirs).logits)
    assert ours.report().note.startswith("left whole")


def test_a_padded_batch_at_full_budget_is_bit_identical(family: str) -> None:
    model, ids = make_model(family, torch.float32), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :15] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    ours = model.generate(ids, past_key_values=KeepCache(model, 1.0), output_logits=True, **options)
    theirs = model.generate(ids, output_logits=True, **options)
    assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))


def test_the_method_full_keeps_everything_at_any_budget() -> None:
    model = make_model()
    assert read(model, tokens(1, LENGTH), budget=0.1, method="full").report().note


EVERYTHING = Method(
    "everything", "all tokens, through the compact part", "", score.recency, lambda s, n: [[LENGTH] * s.shape[1]] * len(s)
)


def test_the_compact_part_answers_like_the_dense_one(family: str) -> None:
    """All tokens moved into slots: same logits as the full cache, for one new token, for several, and again later."""
    model, ids = make_model(family), tokens(2, LENGTH + 30, seed=1)
    ours = read(model, ids[:, :LENGTH], budget=0.99, method=EVERYTHING, slot_dtype="float")
    theirs = DynamicCache(config=model.config)
    model(ids[:, :LENGTH], past_key_values=theirs)
    assert all(layer.slots is not None and layer.tail == 0 for layer in ours.keep_layers)
    for lo, hi in ((0, 1), (1, 20), (20, 21), (21, 30)):
        new = ids[:, LENGTH + lo : LENGTH + hi]
        got, full = model(new, past_key_values=ours).logits, model(new, past_key_values=theirs).logits
        torch.testing.assert_close(got, full, rtol=1e-9, atol=1e-9)


def test_default_budgets_are_ragged() -> None:
    report = read(make_model(), tokens(1, 300), budget=0.05).report()
    assert len({count for layer in report.kept[0] for count in layer}) > 1


def test_compression_costs_less_than_eviction_of_the_same_tokens() -> None:
    """The default fits; its own selection without the fit must be further from the full cache."""
    model, ids = make_model("llama", torch.float32, seed=3), tokens(1, 460, seed=2)
    row = METHODS["keepkv"]
    plain = Method(
        "plain", "its selection, evicted", "", row.score, row.allot, row.sinks, row.recent, references=row.references
    )
    whole = KeepCache(model, auto=False, slot_dtype="float")
    model(ids[:, :400], past_key_values=whole)

    def log_probs(cache: KeepCache) -> torch.Tensor:
        return model(ids[:, 400:], past_key_values=cache).logits.double().log_softmax(-1)

    full = log_probs(whole.fork().compress("100%"))
    kl = {m.name: (full.exp() * (full - log_probs(whole.fork().compress(0.15, m)))).sum(-1).mean() for m in (row, plain)}
    assert kl["keepkv"] < 0.7 * kl["plain"]


@pytest.mark.parametrize("method", ["keepkv", "h2o", "snapkv", "keepkv-paper"])
def test_rows_of_a_batch_are_as_if_alone(method: str, family: str) -> None:
    model, lengths = make_model(family), (LENGTH, 75)
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, : LENGTH - 75] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    together = KeepCache(model, 0.3, method, slot_dtype="int4")  # named: rows choose a format together
    got = model.generate(ids, attention_mask=mask, past_key_values=together, **options)
    for row, length in enumerate(lengths):
        alone = KeepCache(model, 0.3, method, slot_dtype="int4")
        own = ids[row : row + 1, LENGTH - length :]
        wanted = model.generate(own, attention_mask=torch.ones_like(own), past_key_values=alone, **options)
        assert together.report().kept[row] == alone.report().kept[0]
        assert together.report().tokens[row] == length
        torch.testing.assert_close(
            torch.stack(got.logits)[:, row], torch.stack(wanted.logits)[:, 0], rtol=1e-6, atol=1e-6
        )  # fmt: skip


def test_beam_search_moves_the_slots_with_the_beams() -> None:
    model, ids = make_model(), tokens(2, 60)
    options = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False}
    full = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    everything = Method("all", "", "", score.recency, lambda s, n: [[60] * s.shape[1]] * len(s))
    cache = KeepCache(model, 0.99, everything, slot_dtype="float")
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options), full)
    assert cache.report().kept


def test_rows_can_be_selected_and_repeated() -> None:
    model, ids = make_model(), tokens(3, 80)
    cache = read(model, ids, budget=0.3, slot_dtype="int4")  # named: rows choose a format together
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 4]))
    single = [read(model, ids[row : row + 1], budget=0.3, slot_dtype="int4") for row in (0, 2)]
    new = tokens(1, 4, seed=8)
    got = model(new.repeat(2, 1), past_key_values=cache).logits
    for row, alone in enumerate(single):
        torch.testing.assert_close(got[row], model(new, past_key_values=alone).logits[0], rtol=1e-8, atol=1e-8)


def test_a_budget_in_bytes_is_kept() -> None:
    model = make_model("llama", torch.float32)
    cache = read(model, tokens(2, 300), budget="60kB")
    assert 0.97 * 60_000 < cache.report().kv_bytes <= 60_000


def test_memory_is_given_back() -> None:
    """No tensor of the prompt's length is left alive after compression."""
    model, ids = make_model("llama", torch.float32), tokens(1, 311)
    cache = read(model, ids, budget=0.1)
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.ndim == 4 and 311 in x.shape]
    assert not alive
    assert cache.compressed


@pytest.mark.parametrize("method", ["keepkv", "random", "keepkv-code"])
def test_same_input_same_seed_same_slots(method: str) -> None:
    model, ids = make_model("llama", torch.float32), tokens(2, 200)
    first, again = (read(model, ids, budget=0.2, method=method, seed=7) for _ in range(2))
    for a, b in zip(first.keep_layers, again.keep_layers, strict=True):
        assert a.slots.offsets == b.slots.offsets
        assert all(torch.equal(x, y) for x, y in zip(a.slots.tensors, b.slots.tensors, strict=True))


def test_importing_changes_nothing_in_transformers() -> None:
    code = """
import torch, transformers
from transformers import cache_utils, masking_utils, modeling_utils
def state():
    owners = (modeling_utils.ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)
    tables = [owner._global_mapping for owner in owners]
    more = [dict(vars(cache_utils)[name]) for name in vars(cache_utils) if name.endswith("_MAPPING")]
    functions = (torch.nn.functional.scaled_dot_product_attention, transformers.Cache.update)
    return [dict(table) for table in tables], more, functions
before = state()
import keepkv
keepkv.KeepCache, keepkv.METHODS
assert state() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_is_as_it_was_afterwards(family: str) -> None:
    model, ids = make_model(family), tokens(1, 60)
    names, before = set(vars(model)), model(ids).logits
    config, hooks = model.config.to_dict(), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    cache = read(model, ids, budget=0.3)
    model(tokens(1, 2), past_key_values=cache)
    assert torch.equal(model(ids).logits, before)
    assert set(vars(model)) == names
    assert model.config.to_dict() == config
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_generate_equals_a_plain_loop(family: str) -> None:
    model, ids = make_model(family), tokens(1, LENGTH)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False}
    generated = model.generate(ids, past_key_values=KeepCache(model, 0.2), **options)[0, LENGTH:].tolist()
    cache, token, loop = KeepCache(model, 0.2), ids, []
    for _ in range(10):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        loop.append(int(token))
    assert generated == loop


def test_sliding_layers_are_left_alone() -> None:
    model, ids = make_model("gemma3"), tokens(1, LENGTH)
    cache, stock = read(model, ids, budget=0.1), DynamicCache(config=model.config)
    model(ids, past_key_values=stock)
    assert type(cache.layers[0]) is type(stock.layers[0])
    assert torch.equal(cache.layers[0].keys, stock.layers[0].keys)


def test_sliding_layers_hold_their_window_and_no_more() -> None:
    """transformers keeps views of all keys of a forward pass; here what has left the window is freed."""
    model = make_model("gemma3", torch.float32)
    cache = read(model, tokens(1, 200), budget=0.1)
    for layer in cache.layers:
        if not isinstance(layer, KeepLayer):
            assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * 4
            assert layer.keys.shape[2] == 23
    assert stored(cache) == cache.report().kv_bytes


def test_reading_in_pieces_is_reading_at_once() -> None:
    model, ids = make_model(), tokens(2, 200)
    at_once, in_pieces = (KeepCache(model, slot_dtype="float", column_mass=True, auto=False) for _ in range(2))
    model(ids, past_key_values=at_once)
    for lo, hi in ((0, 70), (70, 71), (71, 200)):
        model(ids[:, lo:hi], past_key_values=in_pieces)
    for method in ("keepkv", "h2o"):
        one, other = at_once.fork().compress(0.2, method), in_pieces.fork().compress(0.2, method)
        assert one.report().kept == other.report().kept
        for a, b in zip(one.keep_layers, other.keep_layers, strict=True):
            torch.testing.assert_close(a.slots.values, b.slots.values, rtol=1e-4, atol=1e-4)


def test_a_copy_is_a_fork_and_pickling_says_what_to_do() -> None:
    model = make_model("llama", torch.float32)
    cache = read(model, tokens(1, 60), budget=0.3)
    for twin in (copy.copy(cache), copy.deepcopy(cache)):
        assert twin.layers[0].slots is cache.layers[0].slots
        assert twin._projections[0] is cache._projections[0]
        model(tokens(1, 2), past_key_values=twin)
        assert (twin.get_seq_length(), cache.get_seq_length()) == (62, 60)
    with pytest.raises(KeepKVError, match="cannot be pickled"):
        pickle.dumps(cache)


def test_forks_go_their_own_ways() -> None:
    model, ids = make_model(), tokens(1, 100)
    cache = read(model, ids, budget=0.2)
    twin = cache.fork()
    first = model(tokens(1, 5, seed=3), past_key_values=twin).logits
    assert cache.get_seq_length() == 100
    assert twin.get_seq_length() == 105
    assert torch.equal(model(tokens(1, 5, seed=3), past_key_values=cache.fork()).logits, first)
    assert cache.layers[0].slots is twin.layers[0].slots


def test_crop_forgets_exactly_and_refuses_what_is_compressed() -> None:
    model = make_model()
    cache = read(model, tokens(1, 100), budget=0.2)
    before = model(tokens(1, 3, seed=3), past_key_values=cache.fork()).logits
    model(tokens(1, 9, seed=4), past_key_values=cache)
    with pytest.raises(KeepKVError, match="cannot be forgotten"):
        cache.crop(-10)
    cache.crop(-9)
    assert torch.equal(model(tokens(1, 3, seed=3), past_key_values=cache).logits, before)


def test_reset_makes_it_new() -> None:
    model, ids = make_model(), tokens(1, 100)
    cache = read(model, ids, budget=0.2)
    slots = cache.layers[0].slots
    cache.reset()
    assert cache.get_seq_length() == 0
    model(ids, past_key_values=cache)
    assert torch.equal(cache.layers[0].slots.keys[:], slots.keys[:])


def test_a_share_of_a_short_prompt_keeps_the_least_that_must_be_kept_and_says_so() -> None:
    cache = read(make_model(), tokens(1, 20), budget=0.1, slot_dtype="float")
    assert cache.report().slots_per_head == 4
    assert cache.report().note == "0.1 of 20 tokens is fewer than the 4 slots per KV head that must be kept: 4 are"


def test_a_short_row_does_not_keep_a_batch_whole() -> None:
    """One row of 400 tokens and one of 30, at a tenth: neither is left as it is."""
    model = make_model("llama", torch.float32)
    mask = torch.ones(2, 400, dtype=torch.int64)
    mask[1, :370] = 0
    cache = KeepCache(model, 0.1, slot_dtype="float")
    model(tokens(2, 400), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    assert [sum(map(sum, row)) / 6 for row in cache.report().kept] == [225 / 6, 4]
    assert "0.1 of 30 tokens" in cache.report().note


def test_a_count_too_small_for_any_prompt_leaves_it_whole_with_a_warning() -> None:
    model = make_model()
    with pytest.warns(UserWarning, match="stays whole"):
        cache = read(model, tokens(1, 20), budget=3)
    assert cache.report().note.startswith("left whole: budget '3' is 3 slots")
    with pytest.raises(KeepKVError, match="compressed already"):
        cache.compress()


def test_mistakes_are_explained() -> None:
    model = make_model()
    with pytest.raises(KeepKVError, match="has read nothing"):
        KeepCache(model).compress()
    cache = KeepCache(model, auto=False)
    model(tokens(1, 60), past_key_values=cache)
    with pytest.raises(KeepKVError, match="column_mass=True"):
        cache.compress(0.2, "h2o")
    assert cache.report().note == "not compressed yet"
    model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="make a new cache"):
        model(tokens(1, 2), past_key_values=cache)


def test_training_with_dropout_is_refused() -> None:
    model = make_model("llama", attention_dropout=0.5)
    cache = read(model, tokens(1, 60), budget=0.3)
    model.train()
    with pytest.raises(KeepKVError, match=r"model\.eval"):
        model(tokens(1, 2), past_key_values=cache)


def test_own_methods_need_no_registration() -> None:
    class_free = Method("newest", "the newest tokens", "nobody", lambda seen: score.recency(seen), sinks=0, recent=0)
    cache = read(make_model(), tokens(1, 100), budget="10", method=class_free)
    assert cache.layers[0].slots.positions[:10].tolist() == list(range(90, 100))
    assert methods.get(class_free) is class_free


@pytest.mark.parametrize("method", ["keepkv", "snapkv", "keepkv-paper", "h2o"])
def test_spans_stay_in_every_head(method: str) -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, 200)
    cache = KeepCache(model, 0.2, method, auto=False, slot_dtype="float")
    model(ids, past_key_values=cache)
    before = [(layer.keys, layer.values) for layer in cache.keep_layers]
    cache.compress(keep=[(50, 55), (120, 123)])
    wanted = [*range(50, 55), *range(120, 123)]
    for layer, (keys, values) in zip(cache.keep_layers, before, strict=True):
        for head in range(2):
            lo, hi = layer.slots.offsets[head : head + 2]
            positions = layer.slots.positions[lo:hi].tolist()
            assert set(wanted) <= set(positions)
            if method != "keepkv-paper":  # which merges into what it keeps
                at = [lo + positions.index(token) for token in wanted]
                assert torch.equal(layer.slots.keys[at], keys[0, head, wanted])
                assert torch.equal(layer.slots.values[at], values[0, head, wanted])
                assert layer.slots.bias[at].eq(0).all()


@pytest.mark.parametrize("budget", [0.3, 0.22])  # of 300 tokens, 60 of which must stay
def test_more_tokens_than_a_trial_holds_can_stay(budget: float) -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, 300)
    cache = KeepCache(model, budget, auto=False, slot_dtype="float")
    model(ids, past_key_values=cache)
    cache.compress(keep=[(100, 160)])
    slots = sum(sum(layer.slots.counts) for layer in cache.keep_layers)
    assert slots == int(budget * 300 * sum(layer.heads for layer in cache.keep_layers) * 128 / 136)
    for layer in cache.keep_layers:
        for head in range(layer.heads):
            lo, hi = layer.slots.offsets[head : head + 2]
            assert set(range(100, 160)) <= set(layer.slots.positions[lo:hi].tolist())


def test_spans_that_do_not_fit_or_name_no_row_are_refused() -> None:
    model = make_model("llama", torch.float32)
    cache = KeepCache(model, 0.1, auto=False)
    model(tokens(1, 200), past_key_values=cache)
    with pytest.raises(BudgetError, match="100 tokens must stay in every head, but there are only 89 slots"):  # of int4
        cache.fork().compress(keep=[(50, 150)])
    batch = KeepCache(model, 0.1, auto=False)
    model(tokens(2, 200), past_key_values=batch)
    with pytest.raises(KeepKVError, match="a batch"):
        batch.compress(keep=[(50, 60)])
