"""The bank of queries that a layer remembers."""

from __future__ import annotations

import torch

from helpers import randn
from keepkv.observe.bank import WINDOW, Bank


def test_the_bank_is_the_same_however_the_prompt_is_cut() -> None:
    queries, positions = randn(2, 3, 900, 4), torch.arange(900)
    whole = Bank(queries[:, :, :0], positions[:0]).add(queries, positions, 200, seed=5)
    parts = Bank(queries[:, :, :0], positions[:0])
    for lo, hi in ((0, 100), (100, 350), (350, 351), (351, 900)):
        parts = parts.add(queries[:, :, lo:hi], positions[lo:hi], 200, seed=5)
    assert torch.equal(whole.positions, parts.positions)
    assert torch.equal(whole.queries, parts.queries)
    assert len(whole.positions) == 200
    assert whole.positions[-WINDOW:].tolist() == list(range(900 - WINDOW, 900))
    older = whole.positions[:-WINDOW].float()
    assert 300 < older.mean() < 530  # spread evenly over the rest
    assert torch.equal(whole.queries, queries[:, :, whole.positions])
