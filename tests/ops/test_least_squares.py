"""Least squares: elimination against brute force."""

from __future__ import annotations

import torch

from helpers import randn
from keepkv.ops import least_squares


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


def test_what_rounding_makes_negative_does_not_end_in_an_error() -> None:
    """A Gram matrix that was summed in float32 beside a column 1,000 times the others: not positive any more."""
    turn = torch.linalg.qr(randn(6, 6).double())[0]
    gram = turn @ torch.diag(torch.tensor([1e6, 3.0, 2.0, 1.0, 1.0, -1e-4], dtype=torch.float64)) @ turn.T
    target = gram @ randn(6, 2, seed=1).double()
    solution = least_squares.ridge(torch.stack([gram, torch.eye(6).double()]), torch.stack([target, target]), 1e-12)
    assert solution.isfinite().all()
    assert (gram @ solution[0] - target).norm() < 1e-2 * target.norm()
    torch.testing.assert_close(solution[1], target)  # others are solved as if alone


def test_what_is_not_finite_harms_nobody_else() -> None:
    grams = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    grams = grams @ grams.mT
    target = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(1))
    alone = least_squares.ridge(grams[2:], target[2:], 1e-3)
    grams[1, 2, 3] = torch.nan
    grams[0] = torch.inf
    solution = least_squares.ridge(grams, target, 1e-3)
    torch.testing.assert_close(solution[2:], alone)
