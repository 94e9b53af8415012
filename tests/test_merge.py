"""Merging: what is promised for the query it was computed for, for identical entries, and for what stays alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from keepkv.attend.states import exact
from keepkv.merge import fit, similarity
from keepkv.merge.merged import Merged, evict
from keepkv.methods import keepkv_paper
from keepkv.observe.references import attend_all, window
from keepkv.types import Observation, ReferenceRows

ZIP_RULES = [keepkv_paper.zip_merge, keepkv_paper.convex_exact_merge]
ALL_RULES = [*ZIP_RULES, keepkv_paper.mean_merge]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clustered(seed: int, tokens: int = 60, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys in a few tight groups, so that many pass the similarity threshold."""
    centres = randn(6, size, seed=seed)
    return centres[torch.arange(tokens) % 6] + 0.15 * randn(tokens, size, seed=seed + 1), randn(tokens, 8, seed=seed + 2)


def with_level(keys: torch.Tensor, query: torch.Tensor, level: float) -> torch.Tensor:
    """Moves the keys along the query so that the mean logit is `level`."""
    return keys + (level - (keys @ query).mean()) * query / query.square().sum()


@pytest.mark.parametrize("rule", ZIP_RULES)
@pytest.mark.parametrize("level", [-50.0, -7.0, -0.1, 0.0, 0.3, 7.0, 50.0])
@pytest.mark.parametrize("seed", range(5))
def test_zip_is_lossless_for_its_query(rule, level: float, seed: int) -> None:
    """Property 3: zero perturbation for the query the merge was computed for, other entries and the pole included."""
    keys, values = clustered(seed)
    query = randn(16, seed=seed + 9)
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
    merged = keepkv_paper.zip_merge(keys, randn(2, 3), torch.tensor([0]), keys @ query, threshold=0.5)
    assert merged.fallbacks == 1
    assert merged.keys.abs().max() <= keys.abs().max() + 1e-9  # in the hull of its sources


@pytest.mark.parametrize("rule", ALL_RULES)
def test_identical_entries_merge_without_loss_for_every_query(rule) -> None:
    keys, values = randn(5, 16, seed=1).repeat(4, 1), randn(5, 8, seed=2).repeat(4, 1)
    merged = rule(keys, values, torch.arange(5), keys @ randn(16, seed=3), threshold=0.999)
    torch.testing.assert_close(merged.bias.exp(), torch.full((5,), 4.0, dtype=torch.float64))
    queries = 3 * randn(50, 16, seed=4)
    before = exact(queries, keys, values, torch.zeros(20, dtype=torch.float64), 1.0)
    for ours, theirs in zip(exact(queries, merged.keys, merged.values, merged.bias, 1.0), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_what_nothing_merges_into_stays_bit_for_bit(rule) -> None:
    keys, values = randn(40, 16).float(), randn(40, 8, seed=1).float()
    kept = torch.tensor([0, 7, 8, 39])
    merged = rule(keys, values, kept, (keys @ randn(16, seed=2).float()), threshold=0.9999)
    assert torch.equal(merged.keys, keys[kept])
    assert torch.equal(merged.values, values[kept])
    assert torch.equal(merged.bias, torch.zeros(4))


def test_the_code_over_attends_and_zip_does_not() -> None:
    """SYSTEMS 4.1: with summed votes, the score-weighted mean key answers e^KL too loudly."""
    keys, values = clustered(3)
    query = 3 * randn(16, seed=12)
    kept, score = torch.arange(6), keys @ query
    truth = score.logsumexp(0)
    loud = exact(query, *keepkv_paper.mean_merge(keys, values, kept, score, -1.0)[:3], 1.0)[1]
    assert loud > truth + 0.01


def test_the_most_similar_kept_key_is_the_target_and_dissimilar_tokens_are_dropped() -> None:
    keys = torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1], [0.1, 0.9], [-1, 0]])
    assert similarity.nearest_kept(keys, torch.tensor([0, 1]), 0.8).tolist() == [0, 1, 0, 1, -1]


# --- fitting ---


def rows_of(keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor, bias: torch.Tensor | None = None) -> ReferenceRows:
    """Reference rows of one head, asked of all the entries."""
    bias = None if bias is None else bias[None]
    ref = attend_all(queries[None], keys[None], values[None], bias=bias)
    return ReferenceRows(
        ref.queries, ref.visible, ref.log_z, ref.outputs, keys[None], bias, torch.arange(len(keys))[None], ref.repeat_share
    )  # fmt: skip


def fitted(keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, queries: torch.Tensor, verbatim=None, bias=None):
    return fit.fit(values[None], [kept], rows_of(keys, values, queries, bias), None if verbatim is None else verbatim[None])[0]


def attention_error(merged: Merged, keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor) -> float:
    before, _ = exact(queries, keys, values, torch.zeros(len(keys), dtype=torch.float64), 1.0)
    return float((exact(queries, *merged[:3], 1.0)[0] - before).square().mean())


@pytest.mark.parametrize("seed", range(4))
def test_a_fit_beats_eviction_on_queries_it_has_not_seen(seed: int) -> None:
    keys, values = clustered(seed, 300)
    queries = randn(600, 16, seed=seed + 5)
    kept = torch.arange(0, 300, 10)
    merged, evicted = fitted(keys, values, kept, queries), evict(keys, values, kept)
    fresh = randn(200, 16, seed=seed + 77)
    assert merged.fallbacks == 0
    assert attention_error(merged, keys, values, fresh) < 0.5 * attention_error(evicted, keys, values, fresh)
    assert merged.error < merged.evict_error
    assert torch.equal(merged.keys, keys[kept])  # keys stay in place


def test_a_fit_is_trusted_as_far_as_is_asked_for() -> None:
    """The same fit, or eviction, on either side of what it loses of what eviction loses."""
    keys, values = clustered(1, 300)
    rows, kept = rows_of(keys, values, randn(600, 16, seed=6)), torch.arange(0, 300, 10)
    (free,) = fit.fit(values[None], [kept], rows)
    ratio = free.error / free.evict_error
    (above,) = fit.fit(values[None], [kept], rows, trust=1.01 * ratio)
    (below,) = fit.fit(values[None], [kept], rows, trust=0.99 * ratio)
    assert 0 < ratio < 1
    assert (above.fallbacks, below.fallbacks) == (0, 1)
    assert (above.error, below.error) == (free.error, free.evict_error)
    assert torch.equal(above.bias, free.bias)
    assert not below.bias.any()
    assert torch.equal(above.values, free.values)
    assert torch.equal(below.values, values[kept])


def test_a_fit_that_loses_is_not_used() -> None:
    """Property 10: held-out queries unlike the fitted ones make the fit lose; the head is evicted and counted."""
    keys, values = clustered(1, 200)
    queries = randn(400, 16, seed=6)
    held = torch.arange(400) % fit.HOLD_OUT == fit.HOLD_OUT - 1
    kept = torch.arange(40)
    keys[kept[:20]] = 5 * queries[held][:20]  # held-out queries ask for kept tokens alone: eviction is all but exact
    queries[~held] = -queries[held][torch.arange(350) % 50]
    merged = fitted(keys, values, kept, queries)
    assert merged.fallbacks == 1
    assert torch.equal(merged.values, values[kept])
    assert merged.bias.eq(0).all()


def test_duplicates_are_fitted_to_their_number() -> None:
    """Dropped copies of kept tokens: votes must become the number of copies, values must stay."""
    keys, values = randn(8, 16, seed=1).repeat(6, 1), randn(8, 4, seed=2).repeat(6, 1)
    merged = fitted(keys, values, torch.arange(8), randn(400, 16, seed=3))
    torch.testing.assert_close(merged.bias.exp(), torch.full((8,), 6.0, dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(merged.values, values[:8], rtol=1e-3, atol=1e-3)


def test_verbatim_slots_are_not_touched_and_the_others_make_up_for_it() -> None:
    keys, values = clustered(3, 300)
    queries, kept = randn(600, 16, seed=8), torch.arange(0, 300, 10)
    verbatim = torch.zeros(300, dtype=torch.bool)
    verbatim[[0, 50, 55, 290]] = True
    merged, evicted = fitted(keys, values, kept, queries, verbatim), evict(keys, values, kept)
    exactly = verbatim[kept]
    assert torch.equal(merged.values[exactly], values[kept][exactly])
    assert merged.bias[exactly].eq(0).all()
    assert merged.bias[~exactly].ne(0).any()
    fresh = randn(200, 16, seed=78)
    assert attention_error(merged, keys, values, fresh) < 0.7 * attention_error(evicted, keys, values, fresh)


def test_rows_see_only_what_was_visible_to_them() -> None:
    """A window row asked at p gives no share to later tokens, and its shares up to p sum to 1."""
    observation = Observation(randn(2, 50, 8), randn(2, 50, 4), randn(2, 3, 50, 8), torch.arange(50), torch.ones(4), 0.5)
    rows = replace(observation, references=window(observation, 10)).rows(1)
    share = rows.share(torch.arange(50))
    assert rows.visible.tolist() == [*range(41, 51)] * 3
    torch.testing.assert_close(share.sum(1), torch.ones(30), rtol=1e-5, atol=0)
    for row, seen in zip(share, rows.visible.tolist(), strict=True):
        assert row[seen:].eq(0).all()
        assert row[:seen].gt(0).all()


def test_fitting_with_all_tokens_kept_is_a_no_op() -> None:
    keys, values = randn(30, 16), randn(30, 4, seed=1)
    merged = fitted(keys, values, torch.arange(30), randn(80, 16, seed=2))
    assert torch.equal(merged.values, values)
    assert merged.bias.eq(0).all()


def test_near_duplicate_keys_do_not_blow_up_the_fit() -> None:
    keys = randn(4, 16, seed=1).repeat(50, 1) + 1e-6 * randn(200, 16, seed=2)
    values = randn(200, 4, seed=3)
    merged = fitted(keys.float(), values.float(), torch.arange(0, 200, 4), randn(300, 16, seed=4).float())
    assert merged.values.isfinite().all()
    assert merged.values.abs().max() < 10 * values.abs().max()


def test_what_dropped_tokens_were_asked_for_counts_as_lost() -> None:
    keys, values = clustered(2, 300)
    rows, kept = rows_of(keys, values, randn(600, 16, seed=7)), torch.arange(0, 300, 10)
    asked = torch.zeros(300, dtype=torch.float64)
    asked[[3, 10]] = torch.tensor([0.5, 0.7], dtype=torch.float64)
    with_recall = fit.fit(values[None], [kept], rows._replace(repeat_share=asked[None]))[0]
    assert with_recall.evict_error == pytest.approx(fit.fit(values[None], [kept], rows)[0].evict_error + 0.5**2)  # 10 is kept
    assert with_recall.error > 0.25


def test_a_fit_in_blocks_is_nearly_the_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alike tokens far apart, so that blocks share what they answer for; and exactly the same where they share nothing."""
    keys, values = clustered(4, 400)
    kept, queries, fresh = torch.arange(0, 400, 4), randn(900, 16, seed=9), randn(200, 16, seed=79)
    whole = attention_error(fitted(keys, values, kept, queries), keys, values, fresh)
    evicted = attention_error(evict(keys, values, kept), keys, values, fresh)
    monkeypatch.setattr(fit, "BLOCK", 25)
    assert attention_error(fitted(keys, values, kept, queries), keys, values, fresh) < whole + 0.2 * (evicted - whole)

    side = torch.arange(400) >= 200  # two halves of the text that no query asks for together
    keys[:, 0], queries[:, 0] = torch.where(side, -60.0, 60.0), torch.where(torch.arange(900) % 2 == 0, -1.0, 1.0)
    monkeypatch.setattr(fit, "BLOCK", 50)
    apart = fitted(keys, values, kept, queries)
    monkeypatch.setattr(fit, "BLOCK", 100)
    together = fitted(keys, values, kept, queries)
    torch.testing.assert_close(apart.bias, together.bias)
    assert attention_error(apart, keys, values, fresh) == pytest.approx(attention_error(together, keys, values, fresh), rel=0.1)


def test_rows_that_are_only_counted_do_not_change_the_answered_ones() -> None:
    queries, keys, values = randn(2, 900, 8), randn(2, 5000, 8, seed=1), randn(2, 5000, 5, seed=2)
    whole, part = attend_all(queries, keys, values), attend_all(queries, keys, values, answered=100)
    torch.testing.assert_close(part.outputs, whole.outputs[:, :100])
    torch.testing.assert_close(part.log_z, whole.log_z[:, :100])
    assert torch.equal(part.rms_share, whole.rms_share)
    assert len(part.visible) == part.queries.shape[1] == 100


def test_attend_all_is_exact_attention() -> None:
    queries, keys, values = randn(2, 900, 8), randn(2, 5000, 8, seed=1), randn(2, 5000, 5, seed=2)  # three tiles
    reference = attend_all(queries, keys, values)
    share = (queries @ keys.transpose(1, 2)).softmax(-1)
    torch.testing.assert_close(reference.outputs, share @ values)
    torch.testing.assert_close(reference.log_z, (queries @ keys.transpose(1, 2)).logsumexp(-1))
    torch.testing.assert_close(reference.rms_share, share.square().mean(1).sqrt())
