"""KVMerger: consecutive runs, merged with Gaussian weights around a pivot."""

from __future__ import annotations

from dataclasses import replace

import torch

from helpers import randn64
from keepkv.methods import kvmerger
from keepkv.types import Choice
from methods.observed import INF, seen


def test_kvmerger_parts_the_least_similar_neighbours_and_keeps_the_best_of_each_run() -> None:
    keys = randn64(1, 60, 16, seed=4).float()
    observation, scores = replace(seen(heads=1), keys=keys), torch.rand(1, 60)
    scores[0, [0, 59]] = INF
    (choice,) = kvmerger.consecutive(observation, scores, [20], heavy=0.0)
    assert len(choice.kept) == 20
    run = choice.target
    assert run.tolist() == sorted(run.tolist())  # consecutive
    for index, kept in enumerate(choice.kept.tolist()):
        members = (run == index).nonzero().flatten()
        assert kept == int(members[scores[0, members].argmax()])
    cosine = torch.cosine_similarity(keys[0, 1:], keys[0, :-1], dim=-1)
    parted = run.diff() > 0
    inner = slice(1, 58)  # the first and the last token stand alone whatever the cosines
    assert cosine[inner][parted[inner]].max() <= cosine[inner][~parted[inner]].min()
    assert (run == 0).sum() == (run == 19).sum() == 1


def test_kvmergers_weights_are_gaussian_around_the_pivot() -> None:
    keys, values = randn64(6, 16), randn64(6, 8, seed=1)
    choice = Choice(torch.tensor([1, 5]), torch.tensor([0, 0, 0, 0, 0, 1]))
    made = kvmerger.gaussian(keys, values, choice, torch.zeros(6))
    g = (-(keys[:5] - keys[1]).square().sum(1) / 50).exp()
    torch.testing.assert_close(made.keys[0], (g[:, None] * keys[:5]).sum(0) / g.sum())
    torch.testing.assert_close(made.values[0], (g[:, None] * values[:5]).sum(0) / g.sum())
    assert torch.equal(made.keys[1], keys[5])
    assert made.bias.tolist() == [0, 0]
    torch.testing.assert_close(
        kvmerger.gaussian(keys, values, choice, torch.zeros(6), sized=True).values[0], 5 * made.values[0]
    )
