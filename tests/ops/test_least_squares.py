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
