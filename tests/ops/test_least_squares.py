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


def test_columns_of_unlike_size_do_not_end_in_an_error() -> None:
    """A Gram matrix summed in float32, one column 10^6 times the others: not positive any more, and solved all the same."""
    columns = torch.randn(200, 60, generator=torch.Generator().manual_seed(0))
    columns[:, 1:30] = columns[:, 31:] + 1e-6 * columns[:, 1:30]  # and nearly equal ones
    columns[:, 0] *= 1e6
    gram = (columns.T @ columns)[None]
    target = columns.T @ columns[:, 5:6].repeat(1, 3)
    assert int(torch.linalg.cholesky_ex(gram.double() + 1e-9 * torch.eye(60))[1]) > 0
    solution = least_squares.ridge(gram, target[None], 1e-12)
    assert solution.isfinite().all()
    assert (columns @ solution[0] - columns[:, 5:6]).square().mean() < 0.1


def test_what_is_not_finite_harms_nobody_else() -> None:
    grams = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    grams = grams @ grams.mT
    target = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(1))
    alone = least_squares.ridge(grams[2:], target[2:], 1e-3)
    grams[1, 2, 3] = torch.nan
    grams[0] = torch.inf
    solution = least_squares.ridge(grams, target, 1e-3)
    torch.testing.assert_close(solution[2:], alone)
