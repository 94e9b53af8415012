"""A live cache: bounded memory while reading, while writing, across turns, in batches."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from helpers import EVERYTHING, make_model, tokens
from keepkv import BudgetError, InputError, KeepCache, KeepKVError
from keepkv.merge.per_head import evict
from keepkv.methods import METHODS


@pytest.mark.parametrize("tail", [0, 5])
def test_folds_that_keep_everything_change_nothing(family: str, tail: int) -> None:
    """However the text is cut and folded: the same logits as the full cache, with padding in front of one row."""
    model, ids = make_model(family), tokens(2, 120, seed=1)
    mask = torch.ones_like(ids)
    mask[1, :33] = 0
    ours = KeepCache(model, 0.9, EVERYTHING, period=7, tail=tail, slot_dtype="float")
    theirs = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for lo, hi in ((0, 50), (50, 51), (51, 56), (56, 80), *((i, i + 1) for i in range(80, 120))):
        options = {"attention_mask": mask[:, :hi], "position_ids": positions[:, lo:hi]}
        got = model(ids[:, lo:hi], past_key_values=ours, **options).logits
        full = model(ids[:, lo:hi], past_key_values=theirs, **options).logits
        for row in (0, 1):
            real = mask[row, lo:hi].bool()
            torch.testing.assert_close(got[row, real], full[row, real], rtol=1e-9, atol=1e-9)
    assert ours.report().compressions > 4
    assert tail <= ours.report().tail < 7 + tail


def peak_of_reading(model, length: int, **options) -> tuple[int, KeepCache]:
    """The largest number of bytes that hang on the cache after any layer's attention while a prompt is read."""
    cache = KeepCache(model, **options)
    most = 0
    attend = cache._attention

    def spy(*args, **kwargs):
        nonlocal most
        output = attend(*args, **kwargs)
        if all(layer.is_initialized for layer in cache.layers):
            report = cache.report()
            most = max(most, report.kv_bytes + report.watch_bytes)
        return output

    cache._attention = spy
    cache.read(model, tokens(1, length))
    return most, cache


def test_reading_takes_no_more_than_budget_and_chunk_whatever_the_length() -> None:
    model = make_model("llama", torch.float32, max_position_embeddings=8192)
    short, cache = peak_of_reading(model, 762, budget=64, chunk=96, references=64)
    long, _ = peak_of_reading(model, 3066, budget=64, chunk=96, references=64)
    assert long <= 1.02 * short
    layer = cache.keep_layers[0]
    heads = sum(layer.heads for layer in cache.keep_layers)
    queries = 3 * 4 * 16 * 4 * (64 + 96)  # a bank and a chunk's queries of three layers with four query heads
    assert short <= (64 + 96) * heads * layer.price().slot + 2 * queries


def test_writing_takes_no_more_memory_the_longer_it_is() -> None:
    model = make_model("llama", torch.float32, max_position_embeddings=8192)
    cache = KeepCache(model, 48, period=32, references=64)
    model(tokens(1, 100), past_key_values=cache)
    most = []
    for step in range(400):
        model(tokens(1, 1, seed=step), past_key_values=cache)
        report = cache.report()
        most.append(report.kv_bytes + report.watch_bytes)
    assert max(most[200:]) <= max(most[100:200])
    assert cache.report().tail < 32
    gc.collect()


def test_a_fraction_of_a_prompt_read_in_chunks_is_of_the_whole_prompt() -> None:
    model = make_model("llama", torch.float32)
    cache = KeepCache(model, 0.25, chunk=50, references=64, slot_dtype="float").read(model, tokens(1, 400))
    assert cache.report().slots_per_head == 0.25 * 400 * 6 * 128 // 136 / 6


def test_a_budget_that_holds_everything_is_bit_identical_as_long_as_it_does() -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, 90)
    ours, theirs = KeepCache(model, 100, chunk=30), DynamicCache(config=model.config)
    ours.read(model, ids)
    for lo in (0, 30, 60):
        model(ids[:, lo : lo + 30], past_key_values=theirs)
    new = tokens(1, 5, seed=2)
    assert torch.equal(model(new, past_key_values=ours).logits, model(new, past_key_values=theirs).logits)
    assert ours.keep_layers[0].slots is None


@pytest.mark.parametrize("repeated", [True, False])
def test_the_middle_of_a_prompt_that_is_repeated_has_a_merge_of_its_own(repeated: bool) -> None:
    """Until its end, also until that of a second prompt; what is read without a repetition is fitted on the way."""
    model, ids = make_model("llama", torch.float32), tokens(1, 300)
    method = replace(METHODS["keepkv"], midway=evict)
    cache = KeepCache(model, 40, method, chunk=64, period=200, references=64)
    repeat = ids[:, :0] if repeated else None
    votes = []

    def look(done: int, of: int) -> None:
        votes.append(max(float(layer.slots.bias.abs().max()) for layer in cache.keep_layers))

    cache.read(model, ids[:, :180], repeat=repeat, progress=look)
    assert [vote == 0 for vote in votes] == [repeated, repeated, False]
    before = cache.report().compressions
    cache.read(model, ids[:, 180:], repeat=repeat)
    assert (cache.report().compressions, cache.keep_layers[0].tail) == (before + 2, 0)


@pytest.mark.parametrize("seed", range(2))
def test_where_fits_are_good_a_repeated_text_loses_nothing_in_chunks(seed: int) -> None:
    """In a model whose heads look at everything a little; eviction, on the way or at all, would lose hundreds of times more."""
    model, ids, after = make_model("llama", torch.float32, seed), tokens(1, 600, seed=seed), tokens(1, 20, seed=seed + 5)
    full = DynamicCache(config=model.config)
    model(ids, past_key_values=full)
    wanted = model(after, past_key_values=full).logits[0].log_softmax(-1)
    lost = []
    for method in ("keepkv", "snapkv"):
        cache = KeepCache(model, 0.2, method, chunk=64).read(model, ids, repeat=ids[:, :8])
        ours = model(after, past_key_values=cache).logits[0].log_softmax(-1)
        lost.append(float((wanted.exp() * (wanted - ours)).sum(-1).mean()))
    assert lost[0] < 0.01 * lost[1]


@pytest.mark.parametrize("method", ["keepkv", "h2o", "snapkv", "keepkv-paper"])
def test_rows_read_in_chunks_and_folded_are_as_if_alone(method: str) -> None:
    model, lengths = make_model(), (150, 67, 20)
    ids, mask = tokens(3, 150), torch.ones(3, 150, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, : 150 - length] = 0
    options = {"max_new_tokens": 40, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def run(ids, mask, budget) -> tuple[torch.Tensor, torch.Tensor]:
        cache = KeepCache(model, budget, method, chunk=32, period=16, references=64, slot_dtype="float")
        cache.read(model, ids[:, :-1], mask[:, :-1])
        made = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        assert cache.report().compressions > 2
        return made.sequences[:, ids.shape[1] :], torch.stack(made.logits)

    budgets = [0.5, 24, 0.6]
    words, logits = run(ids, mask, budgets)
    for row, length in enumerate(lengths):
        alone, wanted = run(ids[row : row + 1, 150 - length :], mask[row : row + 1, 150 - length :], budgets[row])
        assert torch.equal(words[row], alone[0])
        torch.testing.assert_close(logits[:, row], wanted[:, 0], rtol=1e-4, atol=1e-4)


def test_beams_are_folded_row_by_row() -> None:
    """Beam search over a cache whose folds keep everything finds what it finds over the full cache."""
    model, ids = make_model(), tokens(2, 60)
    options = {"num_beams": 3, "max_new_tokens": 30, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    full = model.generate(ids, **options)
    cache = KeepCache(model, 0.99, EVERYTHING, period=8, slot_dtype="float")
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), full)
    assert cache.report().compressions > 2
    assert len(cache.report().tokens) == 6


def test_sampling_draws_the_same_words() -> None:
    model, ids = make_model(), tokens(2, 60)
    made = []
    for cache in (None, KeepCache(model, 0.99, EVERYTHING, period=8, slot_dtype="float")):
        torch.manual_seed(5)
        made.append(model.generate(ids, past_key_values=cache, do_sample=True, max_new_tokens=30))
    assert torch.equal(*made)


def test_rows_that_finish_early_leave_the_others_alone() -> None:
    model, ids = make_model(), tokens(3, 60)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False, "pad_token_id": 2}

    def run(ids: torch.Tensor, **more: object) -> torch.Tensor:
        mask = torch.ones_like(ids)
        return model.generate(
            ids, past_key_values=KeepCache(model, 20, period=8), **{**options, "attention_mask": mask, **more}
        )

    free = run(ids)
    end = int(free[1, 66])  # what one row writes early ends it
    ended = run(ids, eos_token_id=end)
    lengths = []
    for row in range(3):
        alone = run(ids[row : row + 1], eos_token_id=end)[0]
        lengths.append(len(alone))
        assert torch.equal(ended[row, : len(alone)], alone)
        assert ended[row, len(alone) :].eq(2).all()
    assert min(lengths) < max(lengths)


def test_budgets_follow_their_rows() -> None:
    model = make_model()
    cache = KeepCache(model, [20, 40, 60], period=10)
    model(tokens(3, 80), past_key_values=cache)
    slots = [sum(map(sum, row)) for row in cache.report().kept]
    assert [count / slots[0] for count in slots] == [1, 2, 3]
    cache.batch_select_indices(torch.tensor([2, 0]))
    for step in range(10):
        model(tokens(2, 1, seed=step), past_key_values=cache)
    assert [sum(map(sum, row)) for row in cache.report().kept] == [slots[2], slots[0]]
    with pytest.raises(KeepKVError, match="3 budgets for 1 rows"):
        model(tokens(1, 80), past_key_values=KeepCache(model, [20, 40, 60]))


def test_assisted_generation_writes_what_greedy_generation_writes() -> None:
    """Candidates from the prompt itself are tried and cropped; the tail is where they can be cropped from."""
    model, ids = make_model(), tokens(1, 30).repeat(1, 4)
    options = {
        "eos_token_id": 0,
        "pad_token_id": 2,
        "max_new_tokens": 40,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    full = model.generate(ids, **options)
    cache = KeepCache(model, 0.5, EVERYTHING, period=16, tail=12, slot_dtype="float")
    assert torch.equal(model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=8, **options), full)
    assert cache.report().compressions > 1


@pytest.mark.parametrize("method", ["keepkv", "h2o"])
def test_cropped_and_read_again_is_as_if_nothing_had_happened(method: str) -> None:
    model = make_model()
    cache = KeepCache(model, 30, method, period=40, references=64)
    model(tokens(1, 100), past_key_values=cache)
    twin = cache.fork()
    model(tokens(1, 20, seed=3), past_key_values=cache)
    cache.crop(-20)
    for one in (cache, twin):
        for step in range(45):
            model(tokens(1, 1, seed=step), past_key_values=one)
    assert cache.report().compressions == twin.report().compressions == 2
    for a, b in zip(cache.keep_layers, twin.keep_layers, strict=True):
        assert torch.equal(a.slots.positions, b.slots.positions)
        assert torch.equal(a.slots.values[:], b.slots.values[:])


def test_a_crop_past_the_start_changes_nothing(family: str) -> None:
    model = make_model(family)
    cache = KeepCache(model, 30, period=40)
    model(tokens(1, 100), past_key_values=cache)
    model(tokens(1, 5, seed=1), past_key_values=cache)
    before = model(tokens(1, 3, seed=2), past_key_values=cache.fork()).logits
    for count in (-6, -1000, 3):  # 3: all but the first three
        with pytest.raises(KeepKVError, match="cannot be forgotten"):
            cache.crop(count)
    assert torch.equal(model(tokens(1, 3, seed=2), past_key_values=cache).logits, before)


def test_forks_share_what_they_hold_and_go_their_own_ways() -> None:
    """Copy on write: branching copies nothing; each branch folds on its own, the trunk stays."""
    model = make_model()
    trunk = KeepCache(model, 30, period=20, backing="cpu")
    model(tokens(1, 100), past_key_values=trunk)
    stored = [(layer.slots, layer.keys, layer.backing) for layer in trunk.keep_layers]
    branches = [trunk.fork() for _ in range(3)]
    for branch in branches:
        for layer, (slots, keys, backing) in zip(branch.keep_layers, stored, strict=True):
            assert layer.slots is slots
            assert layer.keys is keys
            assert layer.backing is backing
    for number, branch in enumerate(branches):
        for step in range(25):
            model(tokens(1, 1, seed=100 * number + step), past_key_values=branch)
        assert branch.report().compressions == 2
    assert trunk.get_seq_length() == 100
    for layer, (slots, keys, backing) in zip(trunk.keep_layers, stored, strict=True):
        assert layer.slots is slots
        assert layer.keys is keys
        assert layer.backing is backing


def test_a_forward_pass_larger_than_the_chunk_is_refused_with_the_way_out() -> None:
    model, ids = make_model(), tokens(1, 80)
    cache = KeepCache(model, 20, chunk=32)
    with pytest.raises(KeepKVError, match="prefill_chunk_size=32"):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, prefill_chunk_size=32, max_new_tokens=5
    )
    assert made.shape[1] == 85
    assert cache.report().compressions == 2  # 64 tokens, and 16 in the tail


@pytest.mark.parametrize(
    "options", [{"period": 0}, {"chunk": -1}, {"tail": -1}, {"refresh": 0}, {"backing": "tape"}, {"backing": "cpu"}]
)
def test_unusable_settings_are_refused(options: dict) -> None:
    with pytest.raises(InputError):
        KeepCache(make_model(), **options)


def test_a_failed_compression_changes_nothing() -> None:
    model = make_model()
    cache = KeepCache(model, 20, period=50)
    model(tokens(1, 100), past_key_values=cache)
    model(tokens(1, 10), past_key_values=cache)
    before = [layer.slots for layer in cache.keep_layers]
    with pytest.raises(BudgetError, match="must stay"):
        cache.compress(10, keep=[(0, 0), (100, 110), (0, 90)])
    assert [layer.slots for layer in cache.keep_layers] == before
    assert str(cache.policy.budgets[0]) == "20"
    cache.compress()
    assert cache.report().slots_per_head == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_folds_like_float64(dtype: torch.dtype) -> None:
    """Biases stay float32; as far from the full float64 cache as the float64 folds are, but for the model's own rounding."""
    ids = tokens(1, 260)
    logits = {}
    for name in (torch.float64, dtype):
        model = make_model("llama", name)
        cache = KeepCache(model, 60, period=20, references=128, slot_dtype="float")
        full = DynamicCache(config=model.config)
        for lo, hi in ((0, 120), *((i, i + 20) for i in range(120, 240, 20))):
            model(ids[:, lo:hi], past_key_values=cache)
            model(ids[:, lo:hi], past_key_values=full)
        assert cache.keep_layers[0].slots.bias.dtype == torch.float32
        assert cache.keep_layers[0].slots.keys.dtype == name
        logits[name] = [model(ids[:, 240:], past_key_values=c).logits.double() for c in (cache, full)]
    truth = logits[torch.float64][1]
    ours, rounded, exact = ((x - truth).abs().mean() for x in (*logits[dtype], logits[torch.float64][0]))
    assert ours < 1.2 * exact + 2 * rounded


def test_parts_of_a_model_can_be_compiled_and_the_whole_says_why_not() -> None:
    """The parts without attention are traced once and not again, whatever is folded; attention is not."""
    model = make_model("llama", torch.float32)
    made, graphs = [], []

    def count(graph: torch.fx.GraphModule, example: object) -> object:
        graphs.append(graph)
        return graph.forward

    for compiled in (False, True):
        cache = KeepCache(model, 30, period=8)
        model(tokens(1, 60), past_key_values=cache)
        if compiled:
            for layer in model.model.layers:
                layer.mlp.compile(backend=count, dynamic=False)
        made.append([model(tokens(1, 1, seed=step), past_key_values=cache).logits for step in range(20)])
    assert cache.report().compressions == 3
    torch.testing.assert_close(made[0], made[1])
    assert 1 <= len(graphs) <= len(model.model.layers)
    torch._dynamo.reset()
    whole = torch.compile(make_model("llama", torch.float32), backend="eager")
    with pytest.raises(Exception, match="compile other parts"):
        whole(tokens(1, 60), past_key_values=KeepCache(model, 30))
    torch._dynamo.reset()
