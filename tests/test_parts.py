"""The small pure parts: budgets, rotation, allotment, choice, observation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import make_model, tokens
from keepkv import allot, choose, score
from keepkv.budget import Budget
from keepkv.errors import BudgetError, InputError, MethodError
from keepkv.merge import fit
from keepkv.methods import METHODS, baselines, expected_attention, get, keepkv_paper
from keepkv.models import families
from keepkv.observe.bank import WINDOW, Bank
from keepkv.observe.references import attend_all, context
from keepkv.observe.watch import LayerState, Watch
from keepkv.ops import least_squares
from keepkv.ops.rope import rotate
from keepkv.types import Observation


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- budgets ---


@pytest.mark.parametrize(
    ("text", "slots"),
    [("0.1", 2000), ("10%", 2000), (0.1, 2000), ("1e-1", 2000), ("512", 10240), (512, 10240), ("64kB", 640), ("64KiB", 655),
     ("0.5MB", 5000), ("100%", 20000), ("1.0", 20000), (1.0, 20000), ("5000", 20000), ("9GB", 20000)],
)  # fmt: skip
def test_budgets_are_read_and_resolved(text: str | float, slots: int) -> None:
    assert Budget.parse(text).total_slots(tokens=1000, heads=20, slot_bytes=100) == slots


@pytest.mark.parametrize("text", ["", "ten", "-1", "0.0", "0%", "101%", "1.5", "5 apples", "nan", "inf", "0x10", "1,5"])
def test_unreadable_budgets_are_refused(text: str) -> None:
    with pytest.raises(BudgetError):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0.001", "3", "1kB", "0"])
def test_budgets_below_what_must_be_kept_are_refused_with_the_least_that_works(text: str) -> None:
    with pytest.raises(BudgetError, match="give at least") as caught:
        Budget.parse(text).total_slots(tokens=1000, heads=20, slot_bytes=100)
    least = str(caught.value).rsplit(" ", 1)[1]
    assert Budget.parse(least).total_slots(tokens=1000, heads=20, slot_bytes=100) >= 4 * 20


def test_unknown_methods_name_the_nearest() -> None:
    with pytest.raises(MethodError, match="did you mean 'snapkv'"):
        get("snapvk")


# --- rotary positions ---


@pytest.mark.parametrize("family", ["llama", "llama-scaled-rope", "phi3", "gemma3", "qwen3"])
@pytest.mark.parametrize("shift", [0, 1, 777, -300])
def test_rotation_is_the_models_own(family: str, shift: int) -> None:
    """Rotating a query asked at p by `shift` gives what the model itself computes at p + shift."""
    model = make_model(family, torch.float32)
    rotary = families.rotary(model)
    kind = {"layer_type": "full_attention"} if family == "gemma3" else {}
    query, position = randn(1, 4, 9, 16), torch.arange(300, 309)[None]

    def at(where: torch.Tensor) -> torch.Tensor:
        cos, sin = rotary(query, where, **kind)
        size = cos.shape[-1]
        turned = query[..., :size]
        half = torch.cat((-turned[..., size // 2 :], turned[..., : size // 2]), -1)
        return torch.cat((turned * cos[:, None] + half * sin[:, None], query[..., size:]), -1)

    got = rotate(at(position), torch.full((9,), shift), families.frequencies(rotary))
    torch.testing.assert_close(got, at(position + shift), rtol=1e-3, atol=1e-3)


# --- allot and choose ---


def test_uniform_and_cosine_spend_exactly_the_total() -> None:
    scores = torch.rand(5, 3, 40)
    for rule in (allot.uniform, allot.cosine_layers, allot.everywhere):
        for total in (60, 61, 74, 599):
            counts = rule(scores, total)
            assert sum(map(sum, counts)) == total
            assert all(0 <= count <= 40 for layer in counts for count in layer)
    assert allot.uniform(scores, 61)[0] == [5, 4, 4]
    falling = [sum(layer) for layer in allot.cosine_layers(scores, 300)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < falling[0]


def test_global_budgets_follow_the_scores_above_a_floor() -> None:
    scores = torch.rand(2, 2, 100) * torch.tensor([[[1.0], [1.0]], [[1.0], [100.0]]])
    counts = allot.everywhere(scores, 80, floor=0.3)
    assert counts == [[6, 6], [6, 62]]


def test_budgets_by_need_make_a_slot_worth_the_same_everywhere() -> None:
    """Errors e = c / n: with n' in proportion to sqrt(c), the loss of one slot less, c / n'^2, is the same for all heads."""
    cost = torch.tensor([[1.0, 4.0], [9.0, 25.0]])
    tried = [[20, 40], [10, 30]]
    errors = (cost / torch.tensor(tried)).tolist()
    counts = allot.by_need(tried, tried, errors, [1000] * 4, 0)
    assert sum(map(sum, counts)) == 100
    torch.testing.assert_close(cost / torch.tensor(counts).square(), torch.full((2, 2), 11**2 / 100**2), rtol=0.15, atol=0)


def test_budgets_by_need_keep_their_bounds() -> None:
    counts = allot.by_need([[50, 50], [50, 50]], [[10, 10], [10, 10]], [[0.0, 1e-4], [0.5, 1.5]], [90] * 4, 7)
    assert sum(map(sum, counts)) == 200
    assert min(map(min, counts)) == 15  # .3 of the average
    assert max(map(max, counts)) == 90
    assert min(map(min, allot.by_need([[30, 30]], [[10, 10]], [[0.0, 1.0]], [100] * 2, 25))) == 25


def test_the_best_are_chosen_and_the_first_of_equals() -> None:
    assert choose.best(torch.tensor([1.0, 3, 3, 3, 0]), 2).tolist() == [1, 2]
    assert choose.best(torch.zeros(9), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("slots", "sinks", "recent"), [(100, 4, 32), (20, 4, 10), (8, 2, 4), (4, 1, 2)])
def test_small_budgets_protect_less(slots: int, sinks: int, recent: int) -> None:
    guarded = choose.protect(torch.zeros(200), torch.arange(200), 200, slots, 4, 32).isinf()
    assert guarded[:sinks].all()
    assert guarded[200 - recent :].all()
    assert guarded.sum() == sinks + recent


# --- scores ---


def observation(tokens_read: int = 50, queries: int | None = None, **more: object) -> Observation:
    count = queries or tokens_read
    positions = torch.arange(tokens_read - count, tokens_read)
    inv_freq = 1 / 100 ** (torch.arange(8) / 8)
    return Observation(
        randn(2, tokens_read, 16), randn(2, tokens_read, 16, seed=1), randn(2, 3, count, 16, seed=2), positions, inv_freq,
        0.25, **more,
    )  # fmt: skip


def test_the_moving_average_is_that_of_the_paper_rightly_normalised() -> None:
    seen = observation()
    logits = (seen.queries[:, :, -32:].double() * 0.25) @ seen.keys.double()[:, None].transpose(-1, -2)
    for token in (3, 30, 49):
        weights, total = 0.0, torch.zeros(2, dtype=torch.float64)
        for age in range(32):
            if 49 - age >= token:
                weights += 0.9**age
                total += 0.9**age * logits[:, :, 31 - age, token].exp().mean(1)
        torch.testing.assert_close(
            keepkv_paper.moving_average(seen)[:, token].double(), (total / weights).log(), rtol=1e-4, atol=1e-4
        )


def test_large_logits_do_not_overflow_the_scores() -> None:
    seen = observation()
    loud = Observation(100 * seen.keys, seen.values, seen.queries, seen.query_positions, seen.inv_freq, seen.scale)
    for rule in (keepkv_paper.moving_average, keepkv_paper.window_mean, score.pooled_window, keepkv_paper.weighted_window):
        assert not rule(loud).isnan().any()


def test_expected_attention_is_the_mean_over_gaussian_queries() -> None:
    """Against sampling: queries drawn from the fitted Gaussian, rotated by the mean rotation, attention averaged."""
    seen = observation(tokens_read=40)
    got = expected_attention.expected_attention(seen) / seen.values.norm(dim=-1)
    plain = rotate(seen.queries, -seen.query_positions, seen.inv_freq)[:, :, 4:] * seen.scale
    ahead = torch.arange(40, 40 + 512).double()[:, None] * seen.inv_freq.double()
    cos, sin = ahead.cos().mean(0).float(), ahead.sin().mean(0).float()
    for head in range(2):
        share = torch.zeros(40)
        for group in range(3):
            sample = plain[head, group]
            normal = torch.distributions.MultivariateNormal(
                sample.mean(0), torch.cov(sample.T, correction=0) + 1e-6 * torch.eye(16)
            )
            torch.manual_seed(0)
            drawn = normal.sample((200_000,))
            turned = torch.cat((drawn[:, :8] * cos - drawn[:, 8:] * sin, drawn[:, 8:] * cos + drawn[:, :8] * sin), -1)
            share[4:] += (turned @ seen.keys[head, 4:].T).exp().mean(0).log().softmax(0) / 3
        torch.testing.assert_close(got[head], share, rtol=0.05, atol=1e-3)


def test_chance_is_repeatable_and_differs_by_layer_and_seed() -> None:
    first, again = baselines.chance(observation(seed=3)), baselines.chance(observation(seed=3))
    assert torch.equal(first, again)
    assert not torch.equal(first, baselines.chance(observation(seed=4)))
    assert not torch.equal(first, baselines.chance(observation(seed=3, layer=1)))


def test_every_row_of_the_table_explains_itself() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        assert method.paper or name in ("full", "random")


# --- observation ---


def test_the_bank_is_the_same_however_the_prompt_is_cut() -> None:
    queries, positions = randn(2, 3, 900, 4), torch.arange(900)
    whole = Bank(queries[:, :, :0], positions[:0]).add(queries, positions, 200, seed=5)
    parts = Bank(queries[:, :, :0], positions[:0])
    for lo, hi in ((0, 100), (100, 350), (350, 351), (351, 900)):
        parts = parts.add(queries[:, :, lo:hi], positions[lo:hi], 200, seed=5)
    assert torch.equal(whole.positions, parts.positions)
    assert torch.equal(whole.queries, parts.queries)
    assert len(whole.positions) == 200
    assert whole.positions[-WINDOW:].tolist() == list(range(900 - WINDOW, 900))
    older = whole.positions[:-WINDOW].float()
    assert 300 < older.mean() < 530  # spread evenly over the rest
    assert torch.equal(whole.queries, queries[:, :, whole.positions])


def test_column_mass_is_the_sum_of_causal_attention() -> None:
    queries, keys = randn(2, 2, 3, 30, 8), randn(2, 2, 30, 8, seed=1)
    mask = torch.ones(30, 30, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, :, :4] = False  # four columns of padding
    watch = Watch(0, 100, 0, True, 0.3)
    for lo, hi in ((0, 12), (12, 30)):
        held = LayerState(None, keys[:, :, :hi], keys[:, :, :hi], hi)
        watch = watch.see(queries[:, :, :, lo:hi], held, mask[:, :, lo:hi, :hi]).banked(held)
    logits = 0.3 * queries @ keys[:, :, None].transpose(-1, -2)
    share = logits.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1).nan_to_num()
    torch.testing.assert_close(watch.column_mass[0], share[0].mean(1).sum(1))
    torch.testing.assert_close(watch.column_mass[1], share[1].mean(1).sum(1)[:, 4:])
    assert watch.starts == (0, 4)
    assert watch.banks[1].positions.tolist() == list(range(26))


def test_other_padding_than_on_the_left_is_refused() -> None:
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    mask[..., -1] = False
    with pytest.raises(InputError, match="left-padded"):
        Watch(0, 10, 0, False, 1.0).see(randn(1, 1, 1, 5, 4), LayerState(None, randn(1, 1, 5, 4), randn(1, 1, 5, 4), 5), mask)


def test_tokens_are_drawn_alike() -> None:
    assert torch.equal(tokens(2, 5), tokens(2, 5))


# --- choosing with redundancy ---


def test_eliminating_answers_better_than_the_best_scores() -> None:
    """Groups of alike tokens, which score alike: over a dozen draws, 24 slots lose less when chosen together."""
    ours, best = 0.0, 0.0
    for seed in range(12):
        centre = 2 * randn(6, 8, seed=seed)
        keys = (centre[torch.arange(240) % 6] + 0.5 * randn(240, 8, seed=seed + 100))[None]
        values = randn(1, 240, 4, seed=seed + 200)
        reference = attend_all(randn(1, 800, 8, seed=seed + 300), keys, values)
        seen = Observation(keys, values, randn(1, 1, 4, 8), torch.arange(4), torch.ones(4), 1.0, references=reference)
        distance = (values - values.mean(1, keepdim=True)).norm(dim=-1)
        chosen = [rule(seen, reference.rms_share * distance, [24])[0].kept for rule in (choose.eliminate, choose.top)]
        fits = [fit.fit(values, [kept], seen.rows(slice(1)))[0].error for kept in chosen]
        ours, best = ours + fits[0], best + fits[1]
    assert ours < best


def test_elimination_is_greedy_least_squares() -> None:
    """One column a round: always the one without which ridge regression on the others loses least (brute force)."""
    share, wanted = torch.rand(60, 12, dtype=torch.float64), randn(60, 3).double()
    gram, target = least_squares.normal(share, torch.zeros(12, dtype=torch.float64), wanted)
    strength = 1e-2
    penalty = strength * gram.diagonal().mean() + 1e-12

    def loss(columns: list[int]) -> float:
        part = share[:, columns]
        found = torch.linalg.solve(part.T @ part + penalty * torch.eye(len(columns), dtype=torch.float64), part.T @ wanted)
        return float((part @ found - wanted).square().sum() + penalty * found.square().sum())

    left = list(range(12))
    fixed = torch.zeros(12, dtype=torch.bool)
    fixed[[2, 5]] = True
    for count in range(11, 4, -1):
        left.remove(min((c for c in left if not fixed[c]), key=lambda c: loss([x for x in left if x != c])))
        stay = least_squares.eliminate(
            gram[None], target[None], fixed[None], [12], [count], rounds=12 - count, strength=strength
        )
        assert stay[0].nonzero().flatten().tolist() == left


def test_elimination_keeps_the_count_the_order_and_what_must_stay() -> None:
    keys, values = randn(1, 30, 8), randn(1, 30, 4, seed=1)
    reference = attend_all(randn(1, 64, 8, seed=2), keys, values)
    seen = Observation(keys, values, randn(1, 1, 4, 8), torch.arange(4), torch.ones(4), 1.0, references=reference)
    scores = torch.rand(1, 30, generator=torch.Generator().manual_seed(3))
    scores[0, [4, 14, 24]] = torch.inf
    for count in (3, 5, 17, 30):
        kept = choose.eliminate(seen, scores, [count])[0].kept.tolist()
        assert len(kept) == count
        assert kept == sorted(set(kept))
        assert {4, 14, 24} <= set(kept)


@pytest.mark.parametrize("group", [1, 2, 3, 5])
def test_references_are_the_same_rows_for_any_number_of_query_heads(group: int) -> None:
    """At most two heads a position are answered, at most three score; the 64 newest of all heads come on top."""
    seen = observation(tokens_read=100)
    seen = replace(seen, queries=randn(2, group, 100, 16, seed=3))
    made = context(seen)
    assert made.queries.shape[1] == len(made.visible) == made.outputs.shape[1] == min(group, 2) * 100 + group * 64
    share = replace(seen, references=made).rows(1).share(torch.arange(100))
    torch.testing.assert_close(share.sum(1), torch.ones(len(share)), rtol=1e-4, atol=0)
    torch.testing.assert_close(share @ seen.values[1], made.outputs[1], rtol=1e-4, atol=1e-5)
