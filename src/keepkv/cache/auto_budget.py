"""The budget "auto": the smallest budget whose predicted error a user tolerates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from keepkv.budget import TOLERANCE
from keepkv.cache.cache import KeepCache
from keepkv.compress import Progress
from keepkv.errors import BudgetError, InputError, MethodError
from keepkv.methods import Method

LADDER = ("2%", "3%", "5%", "7%", "10%", "15%", "20%", "30%", "50%")


def check_tolerance(method: Method, tolerance: float) -> None:
    """Raises InputError for a tolerance outside (0, 1), MethodError for a method that holds nothing out."""
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance {tolerance:g}: expected the share of a head's output that may be lost, between 0 and 1")
    if not method.judged:
        raise MethodError(f"{method.name} does not predict its own error, so no budget can be found for it: give one")


def compress_to_tolerance(
    uncompressed: KeepCache,
    method: Method,
    tolerance: float = TOLERANCE,
    progress: Progress = lambda done, of: None,
    keep: Sequence[tuple[int, int]] = (),
) -> KeepCache:
    """Compresses a text to the first budget of LADDER at which little enough is lost; keeps all tokens if there is none.

    What is lost is `Report.error`: the share of a head's output that the method loses on held-out reference queries, a mean
    over heads. How it goes with the quality of answers is measured in docs/notes/error-bound.md. Every step costs one
    compression.

    Args:
        uncompressed: A cache with auto=False that has read a text; it stays as it is.
        method: One that predicts its own error (`Method.judged`).
        tolerance: The largest error, between 0 and 1.
        progress: Called with (steps done, steps in all) of the whole ladder, which is seldom climbed to its end.
        keep: Spans of tokens (first, last + 1) that keep their slots.

    Returns:
        A fork of the cache, compressed.

    Raises:
        InputError, MethodError: as `check_tolerance` does.
    """
    check_tolerance(method, tolerance)
    for step, budget in enumerate(LADDER):
        try:
            cache = uncompressed.fork().compress(budget, method, partial(_progress_of_step, progress, step), keep)
        except BudgetError:  # too few slots for a text as short as this, or for what must be kept
            continue
        if cache.report().error <= tolerance:
            return cache
    return uncompressed.fork().compress("100%", method)


def _progress_of_step(progress: Progress, step: int, done: int, of: int) -> None:
    progress(step * of + done, len(LADDER) * of)
