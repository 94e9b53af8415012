"""Compactor: leverage, attention within chunks, and how the two are blended."""

from __future__ import annotations

from dataclasses import replace

import torch

from helpers import make_model, read, tokens
from keepkv.methods import compactor
from methods.observed import ROTATION, seen


def plain(keys: torch.Tensor) -> torch.Tensor:
    """Keys [H, T, d] without their rotation."""
    return ROTATION.rotate(keys.double(), -torch.arange(keys.shape[1]))


def z(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean()) / x.std()


def test_leverage_is_the_diagonal_of_the_hat_matrix() -> None:
    observation, counted = seen(90), torch.ones(2, 90, dtype=torch.bool)
    counted[:, :8] = counted[:, 86:] = False
    got = compactor.leverage(observation, counted)[:, 8:86].double()
    x = plain(observation.keys)[:, 8:86]
    x = x - x.mean(1, keepdim=True)
    hat = x @ torch.linalg.inv(x.mT @ x + 0.01 * torch.eye(16)) @ x.mT
    torch.testing.assert_close(got, hat.diagonal(dim1=-2, dim2=-1), rtol=1e-4, atol=1e-6)
    assert torch.allclose(got.sum(1), torch.full((2,), 16.0, dtype=torch.float64), rtol=0.01)  # the number of dimensions


def test_the_sketch_is_a_projection_of_the_keys_that_a_seed_repeats() -> None:
    observation, counted = seen(90), torch.ones(2, 90, dtype=torch.bool)
    got = compactor.leverage(observation, counted, sketch=6).double()
    assert torch.equal(got.float(), compactor.leverage(observation, counted, sketch=6))
    assert not torch.equal(got.float(), compactor.leverage(replace(observation, seed=1), counted, sketch=6))
    gaussian = torch.randn(2, 16, 6, generator=observation.generator).double() / 6**0.5
    x = plain(observation.keys)
    x = (x - x.mean(1, keepdim=True)) @ gaussian
    hat = x @ torch.linalg.inv(x.mT @ x + 0.01 * torch.eye(6)) @ x.mT
    torch.testing.assert_close(got, hat.diagonal(dim1=-2, dim2=-1), rtol=1e-4, atol=1e-6)


def test_attention_within_a_chunk_is_not_causal() -> None:
    observation = seen(60)
    counted = torch.zeros(2, 60, dtype=torch.bool)
    counted[:, 8:56] = True
    got = compactor.neighborhood(observation, counted, chunk=20).double()
    queries, keys = observation.queries.double(), observation.keys.double()
    attention = torch.zeros(2, 60, dtype=torch.float64)
    for lo, hi in ((8, 28), (28, 48), (48, 56)):
        logits = queries[:, :, lo:hi] @ keys[:, None, lo:hi].mT
        attention[:, lo:hi] = logits.softmax(-1).sum(2).mean(1)
    times_values = attention * observation.values.double().norm(dim=-1)
    padded = torch.nn.functional.pad(times_values, (1, 1))
    expected = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
    torch.testing.assert_close(got[:, 8:56], expected[:, 8:56], rtol=1e-4, atol=1e-5)
    assert got[:, :8].eq(0).all()


def test_a_sample_of_the_queries_stands_for_all() -> None:
    whole = seen(4000)
    some = torch.arange(0, 4000, 2)
    sample = replace(whole, queries=whole.queries[:, :, some], query_positions=some)
    counted = torch.ones(2, 4000, dtype=torch.bool)
    got, expected = (compactor.neighborhood(observation, counted) for observation in (sample, whole))
    assert 0.95 < float(got.mean() / expected.mean()) < 1.05
    assert torch.corrcoef(torch.stack([got.flatten(), expected.flatten()]))[0, 1] > 0.7
    none = replace(whole, queries=whole.queries[:, :, :0], query_positions=some[:0])
    torch.testing.assert_close(compactor.neighborhood(none, counted)[0, 5], whole.values[0, 4:7].norm(dim=-1).mean())


def test_leverage_counts_as_much_as_is_dropped() -> None:
    observation = replace(seen(90), slots=27.0)
    counted = torch.zeros(2, 90, dtype=torch.bool)
    counted[:, 8:86] = True
    leverage, attention = compactor.leverage(observation, counted), compactor.neighborhood(observation, counted)
    got = compactor.blended(observation)
    expected = 0.7 * z(leverage[:, 8:86]) + z(attention[:, 8:86])
    torch.testing.assert_close(got[:, 8:86], expected)
    assert got[:, :8].eq(expected.max()).all()
    assert got[:, 86:].eq(expected.max()).all()
    torch.testing.assert_close(
        compactor.blended(replace(observation, slots=None))[:, 8:86], 0.35 * z(leverage[:, 8:86]) + z(attention[:, 8:86])
    )
    assert compactor.blended(seen(12)).eq(0).all()


def test_the_compression_says_how_much_it_drops() -> None:
    """compress() tells the score how many slots there are: at a smaller budget, leverage counts more."""
    model = make_model("llama", torch.float32)
    kept = [read(model, tokens(1, 120), budget=budget, method="compactor").layers[0].slots for budget in (30, 60)]
    assert [slots.counts for slots in kept] == [[30, 30], [60, 60]]
    heads = [torch.split(slots.positions, slots.counts)[0].tolist() for slots in kept]
    assert {0, 7, 116, 119} <= set(heads[0]) & set(heads[1])
