"""The KeepKV paper's scores and merges: no loss for the query of the merge, for identical entries, for what stays alone."""

from __future__ import annotations

import pytest
import torch

from helpers import clustered, observation, randn64
from keepkv.attend.states import exact
from keepkv.methods import keepkv_paper


def test_the_moving_average_is_that_of_the_paper_rightly_normalized() -> None:
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


ZIP_RULES = [keepkv_paper.zip_merge, keepkv_paper.convex_exact_merge]
ALL_RULES = [*ZIP_RULES, keepkv_paper.mean_merge]


def with_level(keys: torch.Tensor, query: torch.Tensor, level: float) -> torch.Tensor:
    """Moves the keys along the query so that the mean logit is `level`."""
    return keys + (level - (keys @ query).mean()) * query / query.square().sum()


@pytest.mark.parametrize("rule", ZIP_RULES)
@pytest.mark.parametrize("level", [-50.0, -7.0, -0.1, 0.0, 0.3, 7.0, 50.0])
@pytest.mark.parametrize("seed", range(5))
def test_zip_is_lossless_for_its_query(rule, level: float, seed: int) -> None:
    """Property 3: zero perturbation for the query the merge was computed for, other entries and the pole included."""
    keys, values = clustered(seed)
    query = randn64(16, seed=seed + 9)
    keys = with_level(keys, query, level)
    kept = torch.arange(6)
    merged = rule(keys, values, kept, keys @ query, threshold=-1.0)  # everything finds a target
    before, mass_before = exact(query, keys, values, torch.zeros(60, dtype=torch.float64), 1.0)
    after, mass_after = exact(query, merged.keys, merged.values, merged.bias, 1.0)
    torch.testing.assert_close(mass_after, mass_before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    assert merged.keys.isfinite().all()


def test_the_pole_is_guarded() -> None:
    """x e^x + y e^y = 0 at x = .2784, y = -1: the score-weighted mean logit vanishes and λ has its pole."""
    query = torch.zeros(4, dtype=torch.float64)
    query[0] = 1
    keys = torch.tensor([[0.2784, 5, 0, 0], [-1, 5, 0, 0]], dtype=torch.float64)
    merged = keepkv_paper.zip_merge(keys, randn64(2, 3), torch.tensor([0]), keys @ query, threshold=0.5)
    assert merged.fallbacks == 1
    assert merged.keys.abs().max() <= keys.abs().max() + 1e-9  # in the hull of its sources


def test_what_the_guard_lets_through_is_scaled_by_a_half_to_three_halves() -> None:
    """docs/theory.md 2.5: every merged key is λ times the weighted mean with λ in [1/2, 3/2], or the convex-exact one."""
    zipped = exact_keys = 0
    for seed in range(60):
        keys, values = clustered(seed)
        query = randn64(16, seed=seed + 9)
        keys = with_level(keys, query, [-2.0, -0.5, -0.1, 0.0, 0.1, 0.5, 2.0][seed % 7])
        log_score = keys @ query
        merged = keepkv_paper.zip_merge(keys, values, torch.arange(6), log_score, threshold=-1.0)
        convex = keepkv_paper.convex_exact_merge(keys, values, torch.arange(6), log_score, threshold=-1.0)
        sets = keepkv_paper.Scored(keys, values, torch.arange(6), log_score, -1.0)
        mean = sets.groups.mean(keys, sets.pi)
        scale = (merged.keys * mean).sum(1) / mean.square().sum(1)
        is_exact = (merged.keys == convex.keys).all(1)
        assert merged.fallbacks == int(is_exact.sum())
        torch.testing.assert_close(merged.keys[~is_exact], (scale[:, None] * mean)[~is_exact])
        assert scale[~is_exact].sub(1).abs().le(0.5).all()
        zipped, exact_keys = zipped + int((~is_exact).sum()), exact_keys + int(is_exact.sum())
    assert min(zipped, exact_keys) > 20


def test_an_entry_that_no_query_has_seen_does_not_spoil_its_set() -> None:
    """Its score is 0: λ is not a number, and the guard takes the key that is."""
    keys, values = clustered(1)
    log_score = keys @ randn64(16, seed=3)
    log_score[[10, 20]] = -torch.inf
    merged = keepkv_paper.zip_merge(keys, values, torch.arange(6), log_score, threshold=-1.0)
    assert all(x.isfinite().all() for x in merged[:3])
    assert merged.fallbacks >= 2


@pytest.mark.parametrize("rule", ALL_RULES)
def test_identical_entries_merge_without_loss_for_every_query(rule) -> None:
    keys, values = randn64(5, 16, seed=1).repeat(4, 1), randn64(5, 8, seed=2).repeat(4, 1)
    merged = rule(keys, values, torch.arange(5), keys @ randn64(16, seed=3), threshold=0.999)
    torch.testing.assert_close(merged.bias.exp(), torch.full((5,), 4.0, dtype=torch.float64))
    queries = 3 * randn64(50, 16, seed=4)
    before = exact(queries, keys, values, torch.zeros(20, dtype=torch.float64), 1.0)
    for ours, theirs in zip(exact(queries, merged.keys, merged.values, merged.bias, 1.0), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_what_nothing_merges_into_stays_bit_for_bit(rule) -> None:
    keys, values = randn64(40, 16).float(), randn64(40, 8, seed=1).float()
    kept = torch.tensor([0, 7, 8, 39])
    merged = rule(keys, values, kept, (keys @ randn64(16, seed=2).float()), threshold=0.9999)
    assert torch.equal(merged.keys, keys[kept])
    assert torch.equal(merged.values, values[kept])
    assert torch.equal(merged.bias, torch.zeros(4))


def test_the_code_over_attends_and_zip_does_not() -> None:
    """docs/theory.md, 2.7: with summed votes, the score-weighted mean key answers e^KL too loudly."""
    keys, values = clustered(3)
    query = 3 * randn64(16, seed=12)
    kept, score = torch.arange(6), keys @ query
    truth = score.logsumexp(0)
    loud = exact(query, *keepkv_paper.mean_merge(keys, values, kept, score, -1.0)[:3], 1.0)[1]
    assert loud > truth + 0.01


@pytest.mark.parametrize("rule", [keepkv_paper.zip_merge, keepkv_paper.convex_exact_merge, keepkv_paper.mean_merge])
def test_merging_alike_entries_in_two_steps_is_merging_them_at_once(rule) -> None:
    """Votes add up: 12 copies of 3 entries, merged six by six and then together, are 3 slots of 4 votes each."""
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(3, 8, generator=generator, dtype=torch.float64).repeat(4, 1) for _ in range(2))
    level = torch.randn(3, generator=generator, dtype=torch.float64).repeat(4)
    first = [rule(keys[part], values[part], torch.arange(3), level[part]) for part in (slice(0, 6), slice(6, 12))]
    bias = torch.cat([made.bias for made in first])
    again = rule(
        torch.cat([made.keys for made in first]),
        torch.cat([made.values for made in first]),
        torch.arange(3),
        level[:6],
        bias=bias,
    )
    torch.testing.assert_close(again.bias.exp(), torch.full((3,), 4.0, dtype=torch.float64))
    torch.testing.assert_close(again.keys, keys[:3])
    torch.testing.assert_close(again.values, values[:3])


@pytest.mark.parametrize("rule", [keepkv_paper.zip_merge, keepkv_paper.convex_exact_merge])
@pytest.mark.parametrize("seed", range(3))
def test_zip_is_lossless_for_its_query_with_votes_too(rule, seed: int) -> None:
    """Entries that stand for several tokens already: mass and output of each set stay what they were for that query."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    keys, values, query = torch.randn(20, 8, **draw), torch.randn(20, 4, **draw), torch.randn(8, **draw)
    bias = torch.randint(1, 9, (20,), generator=generator).double().log()
    made = rule(keys, values, torch.arange(5), keys @ query, -1.0, bias=bias)
    before, after = keys @ query + bias, made.keys @ query + made.bias
    torch.testing.assert_close(after.logsumexp(0), before.logsumexp(0))
    torch.testing.assert_close(after.softmax(0) @ made.values, before.softmax(0) @ values)
