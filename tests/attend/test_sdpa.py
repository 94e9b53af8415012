"""The fast attention of PyTorch: as good as low precision allows, and used only where it means what it should."""

from __future__ import annotations

import pytest
import torch

from attend.truth import CPU, masks, randn, slots_of, truth_for
from keepkv.attend import sdpa
from keepkv.attend.dispatch import attend, attend_slots, backend_for
from keepkv.attend.states import block, exact
from keepkv.errors import BackendError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("few", [0, 48])
def test_widened_attention_is_as_good_as_low_precision_allows(dtype: torch.dtype, few: int, monkeypatch) -> None:
    """Truth in float64, plain attention in the dtype, ours: at most a rounding of the output worse than exact."""
    monkeypatch.setattr(sdpa, "FEW", few)
    query, slots = randn(1, 2, 12, 64, dtype=dtype) * 3, slots_of([700, 90], 64, 64, dtype)
    keys, values = randn(1, 2, 20, 64, dtype=dtype, seed=2), randn(1, 2, 20, 64, dtype=dtype, seed=3)
    visible = torch.ones(4, 20, dtype=torch.bool).tril(16)[None, None]
    truth = truth_for(query, slots, keys, values, visible, 0.125)
    ours = attend(query, slots, keys, values, visible, 0.125, "sdpa").to(dtype)
    eager = torch.stack([
        exact(
            query[0, h], torch.cat([slots.keys[lo:hi], keys[0, h]]), torch.cat([slots.values[lo:hi], values[0, h]]),
            torch.cat([slots.bias[lo:hi].to(dtype).expand(12, -1), sdpa.additive(visible, dtype)[0, 0].repeat(3, 1)], 1), 0.125,
        )[0]
        for h, (lo, hi) in enumerate(((0, 700), (700, 790)))
    ])[None]  # fmt: skip
    assert (ours.double() - truth).abs().max() <= (truth.to(dtype).double() - truth).abs().max() + 1e-5
    assert (ours.double() - truth).abs().max() <= (eager.double() - truth).abs().max() + 1e-5


def test_strided_and_empty_inputs_are_kept_from_the_kernel() -> None:
    query = randn(1, 16, 2, 60, dtype=torch.float32).transpose(1, 2).transpose(2, 3)  # [1, 2, 60, 16]
    keys = randn(1, 2, 16, 30, dtype=torch.float32, seed=2).transpose(2, 3)
    values = randn(1, 2, 30, 1, dtype=torch.float32, seed=3).expand(-1, -1, -1, 16)
    for ours, exactly in zip(sdpa.flash(query, keys, values, None, 0.3), block(query, keys, values, None, 0.3), strict=True):
        torch.testing.assert_close(ours, exactly, rtol=1e-5, atol=1e-5)
    for rows in (40, 60):  # either way of the CPU
        nothing = attend(
            query[:, :, :rows], slots_of([0, 0], 16, 16, torch.float32), keys[:, :, :0], values[:, :, :0], None, 1.0
        )
        assert torch.equal(nothing, torch.zeros(1, 2, rows, 16))
    assert sdpa.flash(query[:, :, :0], keys, values, None, 0.3)[0].shape == (1, 2, 0, 16)


def test_causality_is_recognized_and_nothing_else_is() -> None:
    assert sdpa.is_causal(masks(5, 9)["causal"], 9)
    assert sdpa.is_causal(masks(5, 5)["causal"], 5)
    for kind in ("padded", "scattered", "hidden", "finite"):
        assert not sdpa.is_causal(masks(5, 9)[kind], 9)
    for hidden in ((0, 0, 2, 1), (0, 0, 4, 8)):
        almost = masks(5, 9)["causal"].clone()
        almost[hidden] = False
        assert not sdpa.is_causal(almost, 9)
    assert not sdpa.is_causal(masks(5, 9)["causal"] | (torch.arange(9) == 7), 9)
    assert not sdpa.is_causal(torch.ones(1, 1, 5, 3, dtype=torch.bool).tril(), 3)


def test_a_kernel_that_means_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sdpa._kernel

    def missing(*args):
        raise AttributeError

    for kernel in (missing, lambda *args: (whole(*args)[0], whole(*args)[1] / 0.6931)):
        monkeypatch.setattr(sdpa, "_kernel", kernel)
        sdpa.available.cache_clear()
        backend_for.cache_clear()
        with pytest.warns(UserWarning, match="needs a kernel that PyTorch"):
            assert backend_for(CPU, torch.float32, 64).name == "eager"
        with pytest.raises(BackendError, match="needs a kernel"):
            attend_slots(randn(1, 1, 1, 16, dtype=torch.float32), slots_of([3], 16, 16, torch.float32), 1.0, "sdpa")
    monkeypatch.undo()
    sdpa.available.cache_clear()
    backend_for.cache_clear()
    assert sdpa.available()
