"""Backends of attention over slots and tail: which is taken, and that each agrees with float64 for every mask."""

from __future__ import annotations

import pytest
import torch

from attend.truth import COUNTS, CPU, GROUP, NEW, TAIL, masks, randn, slots_in, slots_of, truth_for
from keepkv.attend import bias_in_keys, sdpa
from keepkv.attend.dispatch import attend, attend_slots, attend_tail, backend_for
from keepkv.errors import BackendError
from keepkv.ops.softmax import Softmax


def test_tail_in_tiles_is_the_tail_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values = randn(2, 3, 50, 16), randn(2, 3, 40, 16, seed=2), randn(2, 3, 40, 8, seed=3)
    visible = torch.ones(50, 40, dtype=torch.bool).tril()[None, None]
    whole = attend_tail(query, keys, values, visible, 0.5)
    monkeypatch.setattr("keepkv.attend.dispatch._TILE", 7 * 240)
    for tiled, at_once in zip(attend_tail(query, keys, values, visible, 0.5), whole, strict=True):
        torch.testing.assert_close(tiled, at_once, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", masks(NEW, TAIL))
@pytest.mark.parametrize("rows", ["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree_with_float64_for_every_mask(kind: str, rows: str, dtype: torch.dtype, monkeypatch) -> None:
    if rows == "many":
        monkeypatch.setattr(sdpa, "FEW", 0)
        monkeypatch.setattr(sdpa, "_TILE", 2 * TAIL)
    query, slots = randn(2, 3, GROUP * NEW, 16, dtype=dtype), slots_of(COUNTS, 16, 16, dtype)
    slots.bias[:1], slots.bias[20:40] = -torch.inf, -torch.inf  # the whole first head
    keys, values = randn(2, 3, TAIL, 16, dtype=dtype, seed=2), randn(2, 3, TAIL, 16, dtype=dtype, seed=3)
    visible = masks(NEW, TAIL)[kind]
    truth = truth_for(query, slots, keys, values, visible, 0.3)
    for backend in ("eager", "sdpa", "auto"):
        got = attend(query, slots, keys, values, visible, 0.3, backend)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)


def test_a_row_is_as_if_alone() -> None:
    query, slots = randn(2, 3, 120, 16, dtype=torch.float32), slots_of(COUNTS, 16, 16, torch.float32)
    keys, values = randn(2, 3, 50, 16, dtype=torch.float32, seed=2), randn(2, 3, 50, 16, dtype=torch.float32, seed=3)
    for visible in (None, *(masks(40, 50)[kind] for kind in ("causal", "padded"))):
        for rows in (120, 40):
            together = attend(query[:, :, :rows], slots, keys, values, visible, 0.3)
            for row in (0, 1):
                own = visible if visible is None or len(visible) == 1 else visible[row : row + 1]
                part = (x[row : row + 1] for x in (keys, values))
                alone = attend(query[row : row + 1, :, :rows], slots.rows([row], 3), *part, own, 0.3)
                torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_float64() -> None:
    slots, tail = slots_of([9, 300], value_size=16), [randn(1, 2, 5, 16, seed=seed) for seed in (1, 2, 3)]
    visible = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    grads = []
    for dtype, backend in ((torch.float64, "eager"), (torch.float32, "auto")):
        asked = [x.detach().to(dtype).requires_grad_() for x in tail]
        with torch.enable_grad():
            output = attend(asked[0], slots_in(slots, dtype), *asked[1:], visible, 0.3, backend)
            grads.append(torch.autograd.grad(output.square().sum(), asked))
    for truth, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


def test_auto_names_what_it_takes() -> None:
    backend_for.cache_clear()
    assert backend_for(CPU, torch.float32, 64) == backend_for(CPU, torch.bfloat16, 64) == ("sdpa", "")
    assert backend_for(CPU, torch.float64, 64).name == "eager"
    with pytest.warns(UserWarning, match="needs keys and values of one size, not 64 and 48"):
        assert backend_for(CPU, torch.float32, 64, 48).name == "eager"
    with pytest.warns(UserWarning, match="runs on a CPU, not on mps"):
        assert backend_for(torch.device("mps"), torch.float16, 64).name == "eager"


def test_backends_that_cannot_are_refused() -> None:
    query = randn(1, 1, 2, 16)
    with pytest.raises(BackendError, match="did you mean 'eager'"):
        attend_slots(query, slots_of([3]), 1.0, "eagre")
    with pytest.raises(BackendError, match="float64"):
        attend_slots(query, slots_of([3]), 1.0, "sdpa")
    with pytest.raises(BackendError, match="one size, not 16 and 24"):
        attend_slots(query.float(), slots_of([3], dtype=torch.float32), 1.0, "sdpa")
    with pytest.raises(BackendError, match=r"keepkv\.attend\.bias_in_keys\.widen"):
        attend_slots(query.float(), slots_of([3], 16, 16, torch.float32), 1.0, "bias_in_keys")


@pytest.mark.parametrize("kind", ["none", "causal", "padded"])
@pytest.mark.parametrize("rows", ["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("sunk", [False, True])
def test_capped_logits_and_sinks_agree_with_float64(kind: str, rows: str, dtype, cap, sunk: bool, monkeypatch) -> None:
    """Against slots and tail with the logits capped by hand before votes and masks, and a sink as one more column."""
    if rows == "many":
        monkeypatch.setattr(sdpa, "FEW", 0)
    query, slots = randn(2, 3, GROUP * NEW, 16, dtype=dtype), slots_of(COUNTS, 16, 16, dtype)
    keys, values = randn(2, 3, TAIL, 16, dtype=dtype, seed=2), randn(2, 3, TAIL, 16, dtype=dtype, seed=3)
    sinks = randn(3 * GROUP, seed=4) * 3 if sunk else None
    visible = masks(NEW, TAIL)[kind]
    got = attend(query, slots, keys, values, visible, 0.5, softmax=Softmax(cap, sinks))
    seen = torch.ones(2, 1, NEW, TAIL, dtype=torch.bool) if visible is None else visible.expand(2, 1, -1, -1)
    for b in range(2):
        for h in range(3):
            lo, hi = slots.offsets[b * 3 + h : b * 3 + h + 2]
            logits = query[b, h].double() @ torch.cat([slots.keys[lo:hi], keys[b, h]]).double().T * 0.5
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            logits[:, : hi - lo] += slots.bias[lo:hi]
            logits[:, hi - lo :].masked_fill_(~seen[b, 0].repeat(GROUP, 1), -torch.inf)
            column = torch.full((len(logits), 1), -torch.inf, dtype=torch.float64)
            if sinks is not None:
                column = sinks.view(3, GROUP)[h].repeat_interleave(NEW)[:, None]
            share = torch.cat([logits, column], 1).softmax(-1)[:, :-1].nan_to_num()
            truth = share @ torch.cat([slots.values[lo:hi], values[b, h]]).double()
            torch.testing.assert_close(got[b, h].double(), truth, rtol=1e-5, atol=1e-5)


def test_sinks_and_caps_have_gradients() -> None:
    slots, softmax = slots_of([9, 30], value_size=16), Softmax(2.0, randn(2, seed=4))
    query = randn(1, 2, 5, 16).requires_grad_()
    with torch.enable_grad():
        output = attend(query, slots, randn(1, 2, 5, 16), randn(1, 2, 5, 16, seed=2), None, 0.3, softmax=softmax)
        gradient = torch.autograd.grad(output.sum(), query)[0]
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("backend", ["sdpa", "bias_in_keys"])
def test_a_backend_that_cannot_cap_logits_is_refused(backend: str) -> None:
    query, slots = randn(1, 1, 2, 16, dtype=torch.float32), slots_of([3], 16, 16, torch.float32)
    with pytest.raises(BackendError, match="does not cap logits"):
        attend_slots(query, slots, 1.0, backend, Softmax(cap=5.0))
    widened = bias_in_keys.widen(slots, 1.0)
    with pytest.raises(BackendError, match="'bias_in_keys' does not cap logits"):
        attend(query, widened, query, query, None, 1.0, softmax=Softmax(cap=5.0))
