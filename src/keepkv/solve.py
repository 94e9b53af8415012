"""Solve: the small least-squares problems that choosing and fitting are made of, from a Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST, MOST = 1e-6, 1e4  # bounds of a vote
_COLUMNS = 192  # of a Gram matrix, computed at once


def normal(share: Tensor, recall: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """AᵀA [n, n] and AᵀY [n, k] of the shares A [R, n], the wanted Y [R, k], and of R more rows of one slot each.

    recall [n] is the rms share of those, so that they add R recall² to the diagonal; what they want is the caller's to add.
    """
    gram = share.new_zeros(len(recall), len(recall))
    for lo in range(0, len(recall), _COLUMNS):
        gram[lo : lo + _COLUMNS, : lo + _COLUMNS] = share[:, lo : lo + _COLUMNS].T @ share[:, : lo + _COLUMNS]
    gram = gram.tril() + gram.tril(-1).T
    gram.diagonal().add_(len(share) * recall.square())
    return gram, share.T @ wanted


def votes(gram: Tensor, target: Tensor, free: Tensor | None = None, steps: int = 100) -> Tensor:
    """argmin over w >= 0 of wᵀ G w - 2 tᵀ w, by multiplicative updates w <- w t / (G w) from w = 1.

    gram [n, n] = AᵀA and target [n] = Aᵀ1 of shares A >= 0, so that A w comes close to 1: the kept slots' mass is that of
    all tokens. w never leaves [1e-6, 1e4]; where `free`, bool [n], is false it stays 1.
    """
    w = torch.ones_like(target)
    for _ in range(steps):
        updated = (w * target / (gram @ w).clamp_(min=1e-30)).clamp_(LEAST, MOST)
        w = updated if free is None else torch.where(free, updated, w)
    return w


def ridge(gram: Tensor, target: Tensor, strength: float) -> Tensor:
    """Δ [n, d] of (G + λI) Δ = target, λ = strength × mean diagonal of G, by Cholesky in float64."""
    return torch.cholesky_solve(target.double(), _factor(gram, strength)).to(target.dtype)


def eliminate(gram: Tensor, target: Tensor, fixed: Tensor, count: int, rounds: int, strength: float) -> Tensor:
    """The `count` columns, ascending int64, that are left when those that the others can best replace are dropped.

    Let U [n, k] solve (G + λI) U = target. Without column j the least squares rise by ||U_j||² / [(G + λI)⁻¹]_jj, the others
    adapting (optimal brain surgeon, Hassibi and Stork 1992). In each round the least of these are dropped, and U and the
    inverse are brought up to date for the rest. Where fixed, bool [n], a column stays.
    """
    inverse = torch.cholesky_inverse(_factor(gram, strength))
    solution = inverse @ target.double()
    left = torch.arange(len(gram), device=gram.device)
    for more in range(rounds - 1, -1, -1):
        rise = solution.square().sum(1) / inverse.diagonal()
        order = rise.masked_fill_(fixed[left], torch.inf).argsort(descending=True, stable=True)
        size = count + (len(gram) - count) * more // rounds
        stay, drop = order[:size].sort().values, order[size:]
        taken = inverse[stay][:, drop] @ torch.linalg.inv(inverse[drop][:, drop])
        solution = solution[stay] - taken @ solution[drop]
        inverse = inverse[stay][:, stay] - taken @ inverse[drop][:, stay]
        left = left[stay]
    return left


def _factor(gram: Tensor, strength: float) -> Tensor:
    lifted = gram.double()
    lifted.diagonal().add_(strength * lifted.diagonal().mean() + 1e-12)
    factor: Tensor = torch.linalg.cholesky(lifted)
    return factor
