"""Merge targets: the most similar kept key."""

from __future__ import annotations

import torch

from keepkv.merge import similarity


def test_the_most_similar_kept_key_is_the_target_and_dissimilar_tokens_are_dropped() -> None:
    keys = torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1], [0.1, 0.9], [-1, 0]])
    assert similarity.nearest_kept(keys, torch.tensor([0, 1]), 0.8).tolist() == [0, 1, 0, 1, -1]
