"""The fit of votes and values: better than eviction on queries it has not seen, and not used where it is not."""

from __future__ import annotations

import pytest
import torch

from helpers import clustered, randn64
from keepkv.attend.states import exact
from keepkv.merge import fit
from keepkv.merge.merged import Merged, evict
from keepkv.observe.references import attend_all, context
from keepkv.ops.rope import Rotation
from keepkv.ops.softmax import Softmax, shares
from keepkv.types import Observation, ReferenceRows


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
    queries = randn64(600, 16, seed=seed + 5)
    kept = torch.arange(0, 300, 10)
    merged, evicted = fitted(keys, values, kept, queries), evict(keys, values, kept)
    fresh = randn64(200, 16, seed=seed + 77)
    assert merged.fallbacks == 0
    assert attention_error(merged, keys, values, fresh) < 0.5 * attention_error(evicted, keys, values, fresh)
    assert merged.error < merged.evict_error
    assert torch.equal(merged.keys, keys[kept])  # keys stay in place


def test_a_fit_is_trusted_as_far_as_is_asked_for() -> None:
    """The same fit, or eviction, on either side of what it loses of what eviction loses."""
    keys, values = clustered(1, 300)
    rows, kept = rows_of(keys, values, randn64(600, 16, seed=6)), torch.arange(0, 300, 10)
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
    queries = randn64(400, 16, seed=6)
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
    keys, values = randn64(8, 16, seed=1).repeat(6, 1), randn64(8, 4, seed=2).repeat(6, 1)
    merged = fitted(keys, values, torch.arange(8), randn64(400, 16, seed=3))
    torch.testing.assert_close(merged.bias.exp(), torch.full((8,), 6.0, dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(merged.values, values[:8], rtol=1e-3, atol=1e-3)


def test_verbatim_slots_are_not_touched_and_the_others_make_up_for_it() -> None:
    keys, values = clustered(3, 300)
    queries, kept = randn64(600, 16, seed=8), torch.arange(0, 300, 10)
    verbatim = torch.zeros(300, dtype=torch.bool)
    verbatim[[0, 50, 55, 290]] = True
    merged, evicted = fitted(keys, values, kept, queries, verbatim), evict(keys, values, kept)
    exactly = verbatim[kept]
    assert torch.equal(merged.values[exactly], values[kept][exactly])
    assert merged.bias[exactly].eq(0).all()
    assert merged.bias[~exactly].ne(0).any()
    fresh = randn64(200, 16, seed=78)
    assert attention_error(merged, keys, values, fresh) < 0.7 * attention_error(evicted, keys, values, fresh)


def test_fitting_with_all_tokens_kept_is_a_no_op() -> None:
    keys, values = randn64(30, 16), randn64(30, 4, seed=1)
    merged = fitted(keys, values, torch.arange(30), randn64(80, 16, seed=2))
    assert torch.equal(merged.values, values)
    assert merged.bias.eq(0).all()


def test_near_duplicate_keys_do_not_blow_up_the_fit() -> None:
    keys = randn64(4, 16, seed=1).repeat(50, 1) + 1e-6 * randn64(200, 16, seed=2)
    values = randn64(200, 4, seed=3)
    merged = fitted(keys.float(), values.float(), torch.arange(0, 200, 4), randn64(300, 16, seed=4).float())
    assert merged.values.isfinite().all()
    assert merged.values.abs().max() < 10 * values.abs().max()


def test_what_dropped_tokens_were_asked_for_counts_as_lost() -> None:
    keys, values = clustered(2, 300)
    rows, kept = rows_of(keys, values, randn64(600, 16, seed=7)), torch.arange(0, 300, 10)
    asked = torch.zeros(300, dtype=torch.float64)
    asked[[3, 10]] = torch.tensor([0.5, 0.7], dtype=torch.float64)
    with_recall = fit.fit(values[None], [kept], rows._replace(repeat_share=asked[None]))[0]
    assert with_recall.evict_error == pytest.approx(fit.fit(values[None], [kept], rows)[0].evict_error + 0.5**2)  # 10 is kept
    assert with_recall.error > 0.25


def test_a_fit_in_blocks_is_nearly_the_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alike tokens far apart, so that blocks share what they answer for; and exactly the same where they share nothing."""
    keys, values = clustered(4, 400)
    kept, queries, fresh = torch.arange(0, 400, 4), randn64(900, 16, seed=9), randn64(200, 16, seed=79)
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


def test_a_fit_over_entries_with_votes_answers_better_than_evicting_them() -> None:
    generator = torch.Generator().manual_seed(5)
    centre = 2 * torch.randn(8, 16, generator=generator)
    keys = (centre[torch.arange(160) % 8] + 0.4 * torch.randn(160, 16, generator=generator))[None]
    values = torch.randn(1, 160, 4, generator=generator)
    bias = torch.randint(1, 6, (1, 160), generator=generator).float().log()
    queries = torch.randn(1, 1, 300, 16, generator=generator)
    seen = Observation(
        keys, values, queries, torch.arange(160, 460), Rotation.halves(torch.ones(8)), 0.2, bias=bias,
        key_positions=torch.arange(160)[None], read=460,
    )  # fmt: skip
    seen = Observation(**{**vars(seen), "references": context(seen)})
    made = fit.fit(values, [torch.arange(0, 160, 5)], seen.rows(slice(1)))[0]
    assert made.fallbacks == 0
    assert made.error < 0.6 * made.evict_error


@pytest.mark.parametrize("softmax", [Softmax(sinks=torch.tensor([3.0])), Softmax(cap=2.0), Softmax(2.0, torch.tensor([5.0]))])
def test_a_fit_knows_caps_and_sinks(softmax: Softmax) -> None:
    """Every entry twice: half of the slots with two votes each lose nothing, for queries that the fit has not seen either."""
    keys, values = (x.repeat_interleave(2, 0).float() for x in clustered(3, 40))
    queries, kept = randn64(300, 16, seed=4).float(), torch.arange(0, 80, 2)
    sinks = softmax.of_rows(1, 300)
    ref = attend_all(queries[None], keys[None], values[None], softmax=softmax, sinks=sinks)
    rows = ReferenceRows(
        ref.queries, ref.visible, ref.log_z, ref.outputs, keys[None], None, torch.arange(80)[None], ref.repeat_share,
        softmax=softmax, sink_share=ref.sink_share,
    )  # fmt: skip
    (merged,) = fit.fit(values[None], [kept], rows)
    assert merged.fallbacks == 0
    assert merged.error < 1e-3 * merged.evict_error
    assert merged.mass_error < 0.01

    def output(keys, values, bias) -> torch.Tensor:
        logits = softmax.capped(randn64(100, 16, seed=9) @ keys.double().T) + bias.double()
        return shares(logits, None if sinks is None else sinks[0, :1].double()) @ values.double()

    torch.testing.assert_close(output(*merged[:3]), output(keys, values, torch.zeros(80)), rtol=0.02, atol=0.01)


def test_rows_that_a_sink_answers_count_little() -> None:
    """Half of the queries give nearly everything to their sink. The fit then serves the other half as if it were alone."""
    keys, values = (x.float() for x in clustered(5, 120))
    queries = randn64(400, 16, seed=6).float()
    sinks = torch.where(torch.arange(400) % 2 == 0, -torch.inf, 40.0)[None]
    kept = torch.arange(0, 120, 8)

    def fit_to(queries, sinks) -> tuple[torch.Tensor, torch.Tensor]:
        ref = attend_all(queries[None], keys[None], values[None], sinks=sinks)
        rows = ReferenceRows(
            ref.queries, ref.visible, ref.log_z, ref.outputs, keys[None], None, torch.arange(120)[None], ref.repeat_share,
            sink_share=ref.sink_share,
        )  # fmt: skip
        free = torch.ones(1, len(kept), dtype=torch.bool)
        share = rows.share(kept[None])
        return fit._fitted(share, values[None, kept], rows.outputs, ref.repeat_share[:, kept], free, 1e-3, rows.sunk)

    both, one = fit_to(queries, sinks), fit_to(queries[::2], None)
    for got, expected in zip(both, one, strict=True):
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
