"""Solve: the small least-squares problems that choosing and fitting are made of, from a Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keepkv.ops.ragged import first

LEAST, MOST = 1e-6, 1e4  # bounds of a vote
_COLUMNS = 192  # of a Gram matrix, computed at once


def normal(share: Tensor, repeat_share: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """AᵀA [..., n, n] and AᵀY [..., n, k] of shares A [..., R, n], wanted Y [..., R, k], and of R more rows of one slot.

    repeat_share [..., n] is the rms share of those: they add R recall² to the diagonal; what they want is the caller's to add.
    """
    gram = share.new_zeros(*repeat_share.shape, repeat_share.shape[-1])
    for lo in range(0, repeat_share.shape[-1], _COLUMNS):
        hi = lo + _COLUMNS
        gram[..., lo:hi, :hi] = share[..., lo:hi].mT @ share[..., :hi]
    gram = gram.tril() + gram.tril(-1).mT
    gram.diagonal(dim1=-2, dim2=-1).add_(share.shape[-2] * repeat_share.square())
    return gram, share.mT @ wanted


def votes(gram: Tensor, target: Tensor, free: Tensor | None = None, steps: int = 100) -> Tensor:
    """argmin over w >= 0 of wᵀ G w - 2 tᵀ w, by multiplicative updates w <- w t / (G w) from w = 1.

    gram [..., n, n] = AᵀA and target [..., n] = Aᵀ1 of shares A >= 0, so that A w comes close to 1: the kept slots' mass is
    that of all tokens. w never leaves [1e-6, 1e4]; where `free`, bool [..., n], is false it stays 1.
    """
    w = torch.ones_like(target)
    for _ in range(steps):
        updated = (w * target / (gram @ w[..., None])[..., 0].clamp_(min=1e-30)).clamp_(LEAST, MOST)
        w = updated if free is None else torch.where(free, updated, w)
    return w


def ridge(gram: Tensor, target: Tensor, strength: float, free: Tensor | None = None) -> Tensor:
    """Δ [..., n, d] of (G + λI) Δ = target, λ = strength × mean diagonal of G, by Cholesky in float64.

    Where free, bool [..., n], is false, Δ is 0, and G and λ are those of the others.
    """
    if free is not None:
        target = target.masked_fill(~free[..., None], 0)
    return torch.cholesky_solve(target.double(), _factor(gram, strength, free)).to(target.dtype)


def eliminate(
    gram: Tensor, target: Tensor, fixed: Tensor, have: Sequence[int], counts: Sequence[int], rounds: int, strength: float
) -> Tensor:
    """Which of the first have[h] columns stay, bool [h, n], when all but counts[h] go: those that the others replace best.

    Let U [h, n, k] solve (G + λI) U = target. Without column j the least squares rise by ||U_j||² / [(G + λI)⁻¹]_jj, the others
    adapting (optimal brain surgeon, Hassibi and Stork 1992). In each round the least of these are dropped, and U and the
    inverse are brought up to date for the rest. Where fixed, bool [h, n], a column stays.
    """
    left = first(have, gram.shape[-1], gram.device)
    inverse = torch.cholesky_inverse(_factor(gram, strength, left))
    solution = inverse @ target.double()
    sizes = list(have)
    for more in range(rounds - 1, -1, -1):
        rise = solution.square().sum(-1) / inverse.diagonal(dim1=-2, dim2=-1)
        order = (
            rise.masked_fill_(fixed, torch.inf).masked_fill_(~left, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        )
        smaller = [count + (n - count) * more // rounds for n, count in zip(have, counts, strict=True)]
        most = max(n - m for n, m in zip(sizes, smaller, strict=True))
        if not most:
            continue
        going = first([n - m for n, m in zip(sizes, smaller, strict=True)], most, gram.device)
        place = torch.tensor(smaller, device=gram.device)[:, None] + torch.arange(most, device=gram.device)
        drop = order.gather(1, place.clamp(max=order.shape[1] - 1))
        rows = inverse.take_along_dim(drop[..., None], 1)  # [h, k, n]
        block = rows.take_along_dim(drop[:, None], 2)
        both = going[:, :, None] & going[:, None]
        block = torch.where(both, block, torch.eye(most, dtype=block.dtype, device=block.device))
        taken = torch.linalg.solve(block, rows.masked_fill(~going[..., None], 0)).mT  # [h, n, k]
        solution = solution - taken @ solution.take_along_dim(drop[..., None], 1)
        inverse = inverse - taken @ rows
        left = left & ~torch.zeros_like(left).scatter_(1, drop, going)
        sizes = smaller
    return left


def _factor(gram: Tensor, strength: float, free: Tensor | None = None) -> Tensor:
    """Of G + λI, with zeros for the rows and columns of G where free is false."""
    lifted = gram.double() if free is None else torch.where(free[..., None] & free[..., None, :], gram.double(), 0)
    diagonal = lifted.diagonal(dim1=-2, dim2=-1)
    count = diagonal.shape[-1] if free is None else free.sum(-1).clamp(min=1)
    diagonal.add_((strength * diagonal.sum(-1) / count + 1e-12)[..., None])
    factor: Tensor = torch.linalg.cholesky(lifted)
    return factor
