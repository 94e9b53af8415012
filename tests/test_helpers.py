"""The tests' own helpers."""

from __future__ import annotations

import torch

from helpers import tokens


def test_tokens_are_drawn_alike() -> None:
    assert torch.equal(tokens(2, 5), tokens(2, 5))
