"""Slots: rows are taken whole."""

from __future__ import annotations

import torch

from attend.truth import slots_of


def test_rows_are_taken_whole() -> None:
    slots = slots_of([3, 1, 4, 1, 5, 9])
    taken = slots.rows([2, 0, 2], heads=2)
    assert taken.counts == [5, 9, 3, 1, 5, 9]
    assert torch.equal(taken.keys[:14], slots.keys[9:])
    assert torch.equal(taken.positions[14:18], slots.positions[:4])
