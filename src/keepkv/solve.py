"""Solve: the two small problems that a fit is made of, from their Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST, MOST = 1e-6, 1e4  # bounds of a vote
BLOCK = 192  # columns of a Gram matrix computed at once


def normal(share: Tensor, recall: Tensor) -> tuple[Tensor, Tensor]:
    """AᵀA [n, n] and Aᵀ1 [n] of the shares [R, n] and of R more rows that each ask for one slot alone.

    recall [n] is their rms share per slot, so that they add R recall² to the diagonal and to the target: w = 1 suits them.
    """
    alone = len(share) * recall.square()
    gram = share.new_zeros(len(recall), len(recall))
    for lo in range(0, len(recall), BLOCK):
        gram[lo : lo + BLOCK, : lo + BLOCK] = share[:, lo : lo + BLOCK].T @ share[:, : lo + BLOCK]  # the lower triangle
    gram = gram.tril() + gram.tril(-1).T
    gram.diagonal().add_(alone)
    return gram, share.sum(0) + alone


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
    lifted = gram.double()
    lifted.diagonal().add_(strength * lifted.diagonal().mean() + 1e-12)
    return torch.cholesky_solve(target.double(), torch.linalg.cholesky(lifted)).to(target.dtype)
