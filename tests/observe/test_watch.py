"""Watching a layer: the mass that its tokens receive, and where a row's text starts."""

from __future__ import annotations

import pytest
import torch

from helpers import randn
from keepkv.errors import InputError
from keepkv.observe.watch import LayerState, Watch


def test_column_mass_is_the_sum_of_causal_attention() -> None:
    queries, keys = randn(2, 2, 3, 30, 8), randn(2, 2, 30, 8, seed=1)
    mask = torch.ones(30, 30, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, :, :4] = False  # four columns of padding
    watch = Watch(0, 100, 0, True, 0.3)
    for lo, hi in ((0, 12), (12, 30)):
        held = LayerState(None, keys[:, :, :hi], keys[:, :, :hi], hi)
        watch = watch.see(queries[:, :, :, lo:hi], held, mask[:, :, lo:hi, :hi]).banked(held)
    logits = 0.3 * queries @ keys[:, :, None].transpose(-1, -2)
    share = logits.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1).nan_to_num()
    torch.testing.assert_close(watch.column_mass[0], share[0].mean(1).sum(1))
    torch.testing.assert_close(watch.column_mass[1], share[1].mean(1).sum(1)[:, 4:])
    assert watch.starts == (0, 4)
    assert watch.banks[1].positions.tolist() == list(range(26))


def test_other_padding_than_on_the_left_is_refused() -> None:
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    mask[..., -1] = False
    with pytest.raises(InputError, match="left-padded"):
        Watch(0, 10, 0, False, 1.0).see(randn(1, 1, 1, 5, 4), LayerState(None, randn(1, 1, 5, 4), randn(1, 1, 5, 4), 5), mask)
