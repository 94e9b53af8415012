"""Smallest: the least budget whose predicted error a user tolerates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from keepkv.budget import TOLERANCE
from keepkv.cache.cache import KeepCache
from keepkv.compress import Progress
from keepkv.errors import BudgetError, InputError, MethodError
from keepkv.methods import Method

LADDER = ("2%", "3%", "5%", "7%", "10%", "15%", "20%", "30%", "50%")


def check(method: Method, tolerance: float) -> None:
    """Raises InputError for a tolerance outside (0, 1), MethodError for a method that holds nothing out."""
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance {tolerance:g}: expected the share of a head's output that may be lost, between 0 and 1")
    if not method.judged:
        raise MethodError(f"{method.name} does not predict its own error, so no budget can be found for it: give one")


def smallest(
    read: KeepCache,
    method: Method,
    tolerance: float = TOLERANCE,
    progress: Progress = lambda done, of: None,
    keep: Sequence[tuple[int, int]] = (),
) -> KeepCache:
    """The first budget of LADDER at which the method loses at most `tolerance` of its heads' outputs; else all tokens.

    read: a cache with auto=False that has read a text; it stays as it is. What is lost is what the method measures on
    held-out reference queries, Report.error, in [0, 1]; docs/log.md has how it goes with the KL divergence. Costs one
    compression a step; progress is that of the whole ladder, which is seldom climbed to its end. Raises as `check` does.
    """
    check(method, tolerance)
    for step, budget in enumerate(LADDER):
        try:
            cache = read.fork().compress(budget, method, partial(_on, progress, step), keep)
        except BudgetError:  # too few slots for a text as short as this, or for what must be kept
            continue
        if cache.report().error <= tolerance:
            return cache
    return read.fork().compress("100%", method)


def _on(progress: Progress, step: int, done: int, of: int) -> None:
    progress(step * of + done, len(LADDER) * of)
