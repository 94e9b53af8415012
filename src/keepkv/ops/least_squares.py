"""Least squares: the small problems that choosing and fitting are made of, from a Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keepkv.ops.ragged import first

LEAST, MOST = 1e-6, 1e4  # bounds of a vote
_COLUMNS = 192  # of a Gram matrix, computed at once


def normal(share: Tensor, repeat_share: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The normal equations of reference rows, and the diagonal of a repetition: AᵀA + R diag(r²) and AᵀY.

    The repetition is R more rows, each asking for one slot alone. What they want is added to AᵀY by the caller.
    `docs/theory.md 6.2`.

    Args:
        share: A, [..., R, n].
        repeat_share: r, [..., n], the rms share of the repetition's rows.
        wanted: Y, [..., R, k].

    Returns:
        [..., n, n] and [..., n, k].
    """
    gram = share.new_zeros(*repeat_share.shape, repeat_share.shape[-1])
    for lo in range(0, repeat_share.shape[-1], _COLUMNS):  # a Gram matrix is symmetric: only its lower blocks are computed
        hi = lo + _COLUMNS
        gram[..., lo:hi, :hi] = share[..., lo:hi].mT @ share[..., :hi]
    gram = gram.tril() + gram.tril(-1).mT
    gram.diagonal(dim1=-2, dim2=-1).add_(share.shape[-2] * repeat_share.square())
    return gram, share.mT @ wanted


def votes(gram: Tensor, target: Tensor, free: Tensor | None = None, steps: int = 100) -> Tensor:
    """argmin over w >= 0 of wᵀ G w - 2 tᵀ w, by multiplicative updates w <- w t / (G w) from w = 1. `docs/theory.md 6.2`.

    With G = AᵀA and t = Aᵀ1 of shares A >= 0, A w comes close to 1: the mass of the kept slots is that of all tokens.
    Lee and Seung, NIPS 2000.

    Args:
        gram: G, [..., n, n].
        target: t, [..., n].
        free: bool [..., n]; where it is false, w stays 1.
        steps: How many updates.

    Returns:
        w, [..., n], within [1e-6, 1e4].
    """
    w = torch.ones_like(target)
    for _ in range(steps):
        updated = (w * target / (gram @ w[..., None])[..., 0].clamp_(min=1e-30)).clamp_(LEAST, MOST)
        w = updated if free is None else torch.where(free, updated, w)
    return w


def ridge(gram: Tensor, target: Tensor, strength: float, free: Tensor | None = None) -> Tensor:
    """Δ of (G + κI) Δ = target, κ = strength × mean diagonal of G, by Cholesky in float64. `docs/theory.md 6.3`.

    Args:
        gram: G, [..., n, n].
        target: [..., n, k].
        strength: See above.
        free: bool [..., n]; where it is false, Δ is 0, and G and κ are those of the others.

    Returns:
        [..., n, k], in the dtype of the target.
    """
    if free is not None:
        target = target.masked_fill(~free[..., None], 0)
    return torch.cholesky_solve(target.double(), _factor(gram, strength, free)).to(target.dtype)


def eliminate(
    gram: Tensor, target: Tensor, fixed: Tensor, have: Sequence[int], counts: Sequence[int], rounds: int, strength: float
) -> Tensor:
    """Which columns stay of a least-squares problem, when those are dropped that the others replace best.

    Let U solve (G + κI) U = target. Without column j the least squares rise by ||U_j||² / [(G + κI)⁻¹]_jj, the others adapting.
    In each round the columns of least rise are dropped, and U and the inverse are updated exactly for the rest.
    `docs/theory.md 5.4`; optimal brain surgeon, Hassibi and Stork, NIPS 1992.

    Args:
        gram: G, [h, n, n].
        target: [h, n, k].
        fixed: bool [h, n], columns that stay whatever their rise.
        have: [h], how many columns a head has; those behind them only fill up.
        counts: [h], how many shall stay.
        rounds: In so many rounds the surplus is dropped.
        strength: κ as a share of the mean diagonal of G.

    Returns:
        bool [h, n].
    """
    stay = first(have, gram.shape[-1], gram.device)
    inverse = torch.cholesky_inverse(_factor(gram, strength, stay))
    solution = inverse @ target.double()
    sizes = list(have)
    for rounds_left in range(rounds - 1, -1, -1):
        goals = [count + (n - count) * rounds_left // rounds for n, count in zip(have, counts, strict=True)]
        surplus = [size - goal for size, goal in zip(sizes, goals, strict=True)]
        most = max(surplus)
        if not most:
            continue
        # In this order stand what is fixed, then what would be missed most, last what is gone: now goal to size - 1 go.
        rise = solution.square().sum(-1) / inverse.diagonal(dim1=-2, dim2=-1)
        rise = rise.masked_fill_(fixed, torch.inf).masked_fill_(~stay, -torch.inf)
        order = rise.argsort(dim=-1, descending=True, stable=True)
        rank = torch.tensor(goals, device=gram.device)[:, None] + torch.arange(most, device=gram.device)
        drop = order.gather(1, rank.clamp(max=order.shape[1] - 1))  # [h, k]
        # Heads that drop fewer columns than another fill up with rows and columns of the identity, which change nothing.
        going = first(surplus, most, gram.device)
        rows = inverse.take_along_dim(drop[..., None], 1)  # [h, k, n]
        block = rows.take_along_dim(drop[:, None], 2)
        both = going[:, :, None] & going[:, None]
        block = torch.where(both, block, torch.eye(most, dtype=block.dtype, device=block.device))
        # Setting these columns of U to 0 moves the others by the inverse's columns through its block of what goes.
        taken = torch.linalg.solve(block, rows.masked_fill(~going[..., None], 0)).mT  # [h, n, k]
        solution = solution - taken @ solution.take_along_dim(drop[..., None], 1)
        inverse = inverse - taken @ rows
        stay = stay & ~torch.zeros_like(stay).scatter_(1, drop, going)
        sizes = goals
    return stay


def _factor(gram: Tensor, strength: float, free: Tensor | None = None) -> Tensor:
    """The Cholesky factor of G + κI, with zeros for the rows and columns of G where free is false.

    A G that was summed in float32 may miss being positive by more than κ makes up for, where one column is much larger than the
    others. Then κ is raised tenfold until it does. A G that is not finite gets the factor of I, so that its solution is not
    finite either and whoever judges it falls back; the other heads' do not suffer.
    """
    lifted = gram.double() if free is None else torch.where(free[..., None] & free[..., None, :], gram.double(), 0)
    diagonal = lifted.diagonal(dim1=-2, dim2=-1)
    count = diagonal.shape[-1] if free is None else free.sum(-1).clamp(min=1)
    diagonal.add_((strength * diagonal.sum(-1) / count + 1e-12)[..., None])
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(lifted)
    if failed.any():
        mean = (diagonal.sum(-1) / count)[..., None, None].clamp(min=1e-30)
        unit = torch.eye(lifted.shape[-1], dtype=lifted.dtype, device=lifted.device)
        for raised in (strength * 10**power for power in range(1, 8)):
            more, still = torch.linalg.cholesky_ex(lifted + raised * mean * unit)
            factor = torch.where((failed != 0)[..., None, None], more, factor)
            failed = torch.where(failed != 0, still, failed)
        factor = torch.where((failed != 0)[..., None, None], unit, factor)
    return factor
