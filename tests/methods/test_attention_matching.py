"""Attention matching: votes and values that meet the reference rows' outputs."""

from __future__ import annotations

import torch

from helpers import randn64
from keepkv import choose
from keepkv.attend.states import exact
from keepkv.merge import merged
from keepkv.methods import attention_matching
from keepkv.observe import references
from keepkv.types import Observation
from methods.observed import ROTATION


def test_attention_matching_recovers_the_output_where_nothing_is_missing() -> None:
    """Dropped entries that nobody attends to: votes 1, and the outputs of the reference rows are met."""
    keys, values, queries = randn64(40, 16).float(), randn64(40, 8, seed=1).float(), randn64(300, 16, seed=2).float()
    kept = torch.arange(20)
    keys[20:], queries[:, 0] = 0, 10.0
    keys[20:, 0], keys[:20, 0] = -5.0, 0.0
    ref = references.attend_all(queries[None], keys[None], values[None])
    observation = Observation(keys[None], values[None], queries[None, None], torch.arange(300), ROTATION, 1.0, references=ref)
    made = attention_matching.match(values[None], [kept], observation.rows(slice(1)))[0]
    assert made.bias.abs().max() < 0.05
    ours, _ = exact(queries, *made[:3], 1.0)
    torch.testing.assert_close(ours, ref.outputs[0], rtol=0, atol=0.02)


def test_attention_matching_is_closer_than_eviction_within_its_bounds() -> None:
    keys, values, queries = randn64(200, 16).float(), randn64(200, 8, seed=1).float(), randn64(800, 16, seed=2).float()
    ref = references.attend_all(queries[None], keys[None], values[None])
    observation = Observation(keys[None], values[None], queries[None, None], torch.arange(800), ROTATION, 1.0, references=ref)
    kept = choose.best(attention_matching.answered_most(observation)[0], 40)
    made, evicted = (
        attention_matching.match(values[None], [kept], observation.rows(slice(1)))[0],
        merged.evict(keys, values, kept),
    )
    errors = [(exact(queries, *slots[:3], 1.0)[0] - ref.outputs[0]).square().mean() for slots in (made, evicted)]
    assert errors[0] < 0.7 * errors[1]
    assert made.bias.abs().max() <= 3
    assert torch.equal(made.keys, keys[kept])
    whole = attention_matching.match(values[None], [torch.arange(200)], observation.rows(slice(1)))[0]
    assert torch.equal(whole.values, values)


def test_votes_are_fitted_around_verbatim_slots() -> None:
    """Slots that must stay keep a vote of 1; the others' votes are the least squares of the mass that is then missing."""
    keys, values = randn64(8, 16).float().repeat(5, 1), randn64(8, 8, seed=1).float().repeat(5, 1)
    queries = randn64(400, 16, seed=2).float()
    ref = references.attend_all(queries[None], keys[None], values[None])
    observation = Observation(keys[None], values[None], queries[None, None], torch.arange(400), ROTATION, 1.0, references=ref)
    rows, kept = observation.rows(slice(1)), torch.arange(10)  # tokens 0 and 1 twice, the others once
    verbatim = torch.zeros(1, 40, dtype=torch.bool)
    verbatim[0, [0, 2]] = True
    merged = attention_matching.match(values[None], [kept], rows, verbatim)[0]
    fixed, share = verbatim[0, kept], rows.share(kept[None])[0].double()
    assert merged.bias[fixed].eq(0).all()
    assert torch.equal(merged.values[fixed], values[kept][fixed])
    missing = 1 - share[:, fixed].sum(1)
    # Tokens 1 and 9 are equal, so that only rounding tells their votes apart: what is determined is the mass of all.
    best = torch.linalg.pinv(share[:, ~fixed], rtol=1e-4) @ missing
    mass = share[:, ~fixed] @ merged.bias[~fixed].exp().double()
    torch.testing.assert_close(mass, share[:, ~fixed] @ best, rtol=1e-3, atol=0)
