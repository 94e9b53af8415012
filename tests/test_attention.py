"""Attention over compact part and tail against the plain softmax in float64."""

from __future__ import annotations

import pytest
import torch

from keepkv.attend import bias_in_keys, sdpa
from keepkv.attend.dispatch import attend, attend_slots, attend_tail, backend_for
from keepkv.attend.states import block, exact, merge_states
from keepkv.errors import BackendError
from keepkv.slots.slots import Slots

COUNTS = [1, 15, 63, 255, 0, 1000]  # very different lengths in one layer


def slots_of(
    counts: list[int], size: int = 16, value_size: int = 24, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Slots:
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    offsets = tuple(torch.tensor([0, *counts]).cumsum(0).tolist())
    return Slots(
        torch.randn(total, size, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(total, value_size, generator=generator, dtype=torch.float64).to(dtype),
        torch.rand(total, generator=generator) * 5,
        torch.arange(total, dtype=torch.int32),
        offsets,
    )


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expected(query, slots, tail_keys, tail_values, visible, scale):
    """Per head: one softmax over slots and visible tail tokens, in float64."""
    batch, heads, rows, _ = query.shape
    output = torch.empty(batch, heads, rows, slots.values.shape[1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            lo, hi = slots.offsets[b * heads + h : b * heads + h + 2]
            keys = torch.cat([slots.keys[lo:hi], tail_keys[b, h]]).double()
            values = torch.cat([slots.values[lo:hi], tail_values[b, h]]).double()
            bias = torch.zeros(rows, len(keys), dtype=torch.float64)
            bias[:, : hi - lo] = slots.bias[lo:hi]
            bias[:, hi - lo :].masked_fill_(~visible[b, 0], -torch.inf)
            output[b, h] = exact(query[b, h].double(), keys, values, bias, scale)[0]
    return output


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("tail", [1, 7, 130])
def test_joined_parts_are_one_softmax(rows: int, tail: int) -> None:
    query, slots = randn(2, 3, rows, 16), slots_of(COUNTS)
    keys, values = randn(2, 3, tail, 16, seed=2), randn(2, 3, tail, 24, seed=3)
    visible = torch.rand(2, 1, rows, tail, generator=torch.Generator().manual_seed(4)) < 0.5
    visible[..., -1] = True  # a head without slots must see something
    got, log_mass = merge_states(attend_slots(query, slots, 0.3), attend_tail(query, keys, values, visible, 0.3))
    torch.testing.assert_close(got, expected(query, slots, keys, values, visible, 0.3), rtol=1e-12, atol=1e-12)
    assert log_mass.isfinite().all()


def test_tail_in_tiles_is_the_tail_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values = randn(2, 3, 50, 16), randn(2, 3, 40, 16, seed=2), randn(2, 3, 40, 8, seed=3)
    visible = torch.ones(50, 40, dtype=torch.bool).tril()[None, None]
    whole = attend_tail(query, keys, values, visible, 0.5)
    monkeypatch.setattr("keepkv.attend.dispatch._TILE", 7 * 240)
    for tiled, at_once in zip(attend_tail(query, keys, values, visible, 0.5), whole, strict=True):
        torch.testing.assert_close(tiled, at_once, rtol=1e-13, atol=1e-13)


def test_rows_that_see_no_tail_get_the_slots_alone() -> None:
    query, slots = randn(1, 2, 5, 16), slots_of([9, 4])
    keys, values = randn(1, 2, 3, 16, seed=2), randn(1, 2, 3, 24, seed=3)
    alone = attend_slots(query, slots, 1.0)
    nothing = attend_tail(query, keys, values, torch.zeros(1, 1, 5, 3, dtype=torch.bool), 1.0)
    assert torch.equal(merge_states(alone, nothing)[0], alone[0])
    assert merge_states(nothing, nothing)[0].isfinite().all()


@pytest.mark.parametrize("offset", [-50.0, 0.0, 50.0])
def test_a_vote_of_p_is_p_copies(offset: float) -> None:
    query, keys, values = randn(1, 1, 6, 16), randn(5, 16, seed=2), randn(5, 8, seed=3)
    votes = torch.tensor([1, 2, 7, 1, 40])
    repeated = torch.arange(5).repeat_interleave(votes)
    bias = votes.double().log() + offset
    got = exact(query, keys, values, bias, 1.0)
    copies = exact(query, keys[repeated], values[repeated], torch.full((1, 51), offset, dtype=torch.float64), 1.0)
    for ours, theirs in zip(got, copies, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_blocks_apart_and_together_are_the_same() -> None:
    """Composition: joining two blocks' attention equals attention over their concatenation."""
    query, first, second = randn(1, 1, 4, 16), slots_of([30], seed=5), slots_of([70], seed=6)
    together = Slots(*map(torch.cat, zip(first.tensors, second.tensors, strict=True)), offsets=(0, 100))
    apart = merge_states(attend_slots(query, first, 0.25), attend_slots(query, second, 0.25))
    for ours, theirs in zip(apart, attend_slots(query, together, 0.25), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_eager(dtype: torch.dtype) -> None:
    """Error against float64 truth at most that of plain attention in the same dtype, with some room for chance."""
    query, slots = randn(2, 3, 4, 64, dtype=dtype), slots_of(COUNTS, 64, 64, dtype)
    keys, values = randn(2, 3, 33, 64, dtype=dtype, seed=2), randn(2, 3, 33, 64, dtype=dtype, seed=3)
    truth = expected(query, slots, keys, values, torch.ones(2, 1, 4, 33, dtype=torch.bool), 0.125)
    got = merge_states(attend_slots(query, slots, 0.125), attend_tail(query, keys, values, None, 0.125))[0]
    eager = torch.empty_like(truth)
    for head in range(6):
        lo, hi = slots.offsets[head : head + 2]
        k, v = (
            torch.cat([slots.keys[lo:hi], keys.flatten(0, 1)[head]]),
            torch.cat([slots.values[lo:hi], values.flatten(0, 1)[head]]),
        )
        bias = torch.cat([slots.bias[lo:hi], torch.zeros(33)]).to(dtype)
        eager.view(6, 4, 64)[head] = exact(query.flatten(0, 1)[head], k, v, bias, 0.125)[0].double()
    assert (got.double() - truth).abs().max() <= 1.5 * (eager - truth).abs().max() + 1e-6


# --- backends ---

CPU, NEW, GROUP, TAIL = torch.device("cpu"), 5, 3, 9


def masks(new: int, tail: int, batch: int = 2) -> dict[str, torch.Tensor | None]:
    """Every kind of mask that reaches attention; some leave rows that see nothing of the tail."""
    causal = torch.ones(new, tail, dtype=torch.bool).tril(tail - new)[None, None]
    padded = causal.expand(batch, -1, -1, -1).clone()
    padded[1, :, :, : tail - new + 2] = False
    scattered = torch.rand(batch, 1, new, tail, generator=torch.Generator().manual_seed(4)) < 0.3
    return {
        "none": None,
        "causal": causal,
        "padded": padded,
        "scattered": scattered,
        "hidden": torch.zeros_like(causal),
        "additive": randn(batch, 1, new, tail, seed=5).masked_fill(~scattered, -torch.inf),
        "finite": torch.zeros(1, 1, new, tail).masked_fill(~causal, torch.finfo(torch.float32).min),
    }


def truth_for(query, slots, keys, values, visible, scale):
    """One softmax per head over slots and tail in float64; 0 for rows that see nothing."""
    batch, heads, rows, _ = query.shape
    output = torch.empty(batch, heads, rows, values.shape[3], dtype=torch.float64)
    bias = torch.zeros(1, 1, 1, keys.shape[2]) if visible is None else visible
    bias = sdpa.additive(bias, torch.float64).expand(batch, 1, -1, -1)
    for b in range(batch):
        for h in range(heads):
            lo, hi = slots.offsets[b * heads + h : b * heads + h + 2]
            tail = bias[b, 0].repeat(rows // bias.shape[2], 1)
            both = torch.cat([slots.bias[lo:hi].double().expand(rows, -1), tail], 1)
            k, v = (torch.cat(pair).double() for pair in ((slots.keys[lo:hi], keys[b, h]), (slots.values[lo:hi], values[b, h])))
            output[b, h] = exact(query[b, h].double(), k, v, both, scale)[0].nan_to_num()
    return output


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


@pytest.mark.parametrize("kind", masks(NEW, TAIL))
def test_log_sum_exps_are_those_of_float64(kind: str) -> None:
    """The kernel gives 0 for rows that see nothing, and may give it for others: both must come out right."""
    query, visible = randn(2, 3, GROUP * NEW, 16, dtype=torch.float32), masks(NEW, TAIL)[kind]
    keys, values = randn(2, 3, TAIL, 16, dtype=torch.float32, seed=2), randn(2, 3, TAIL, 16, dtype=torch.float32, seed=3)
    query[:, :, 0] = 0
    slots = slots_of([1, 1, 2, 5, 0, 600], 16, 16, torch.float32)
    slots.bias[:2] = torch.tensor([-torch.inf, 0.0])  # nothing to see; and a log-sum-exp of 0
    truth = attend_tail(query.double(), keys.double(), values.double(), visible, 0.3, "eager")
    tail = attend_tail(query, keys, values, visible, 0.3, "sdpa")
    compact = attend_slots(query, slots, 0.3, "sdpa")
    for ours, exactly in ((tail, truth), (compact, attend_slots(query.double(), slots_in(slots, torch.float64), 0.3))):
        for got, wanted in zip(ours, exactly, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert compact[1][0, 0].eq(-torch.inf).all()
    assert compact[1][0, 1, 0] == 0


def slots_in(slots: Slots, dtype: torch.dtype) -> Slots:
    return Slots(slots.keys.to(dtype), slots.values.to(dtype), slots.bias, slots.positions, slots.offsets)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.125, 128**-0.5, 1.0])
def test_votes_in_spare_dimensions_are_votes(dtype: torch.dtype, scale: float) -> None:
    """Also large ones in low precision, where one number of the keys' dtype would be off by a tenth."""
    query, slots = randn(2, 3, 5, 16, dtype=dtype), slots_of(COUNTS, 16, 16, dtype)
    slots.bias.mul_(2).sub_(3)
    slots.bias[40:50] = -torch.inf
    wide = bias_in_keys.widen(slots, scale)
    for ours, truth in zip(
        attend_slots(query, wide, scale), attend_slots(query.double(), slots_in(slots, torch.float64), scale), strict=True
    ):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-5)
    keys, values = randn(2, 3, 4, 16, dtype=dtype, seed=2), randn(2, 3, 4, 16, dtype=dtype, seed=3)
    torch.testing.assert_close(
        attend(query, wide, keys, values, None, scale), attend(query, slots, keys, values, None, scale), rtol=1e-5, atol=2e-5
    )
    assert torch.equal(wide.keys[:], slots.keys)
    assert wide.keys.tensors[0].nbytes == slots.keys.nbytes * 24 // 16
    both = Slots.cat([wide.rows([1], 3), wide.rows([0], 3)])
    assert torch.equal(attend_slots(query, both, scale)[0][1], attend_slots(query.flip(0), wide, scale)[0][0])


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


def test_causality_is_recognised_and_nothing_else_is() -> None:
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


def test_auto_names_what_it_takes() -> None:
    backend_for.cache_clear()
    assert backend_for(CPU, torch.float32, 64) == backend_for(CPU, torch.bfloat16, 64) == ("sdpa", "")
    assert backend_for(CPU, torch.float64, 64).name == "eager"
    with pytest.warns(UserWarning, match="needs keys and values of one size, not 64 and 48"):
        assert backend_for(CPU, torch.float32, 64, 48).name == "eager"
    with pytest.warns(UserWarning, match="runs on a CPU, not on mps"):
        assert backend_for(torch.device("mps"), torch.float16, 64).name == "eager"


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


def test_backends_that_cannot_are_refused() -> None:
    query = randn(1, 1, 2, 16)
    with pytest.raises(BackendError, match="did you mean 'eager'"):
        attend_slots(query, slots_of([3]), 1.0, "eagre")
    with pytest.raises(BackendError, match="float64"):
        attend_slots(query, slots_of([3]), 1.0, "sdpa")
    with pytest.raises(BackendError, match="one size, not 16 and 24"):
        attend_slots(query.float(), slots_of([3], dtype=torch.float32), 1.0, "sdpa")
    with pytest.raises(BackendError, match=r"keepkv\.spare\.widen"):
        attend_slots(query.float(), slots_of([3], 16, 16, torch.float32), 1.0, "bias_in_keys")


def test_rows_are_taken_whole() -> None:
    slots = slots_of([3, 1, 4, 1, 5, 9])
    taken = slots.rows([2, 0, 2], heads=2)
    assert taken.counts == [5, 9, 3, 1, 5, 9]
    assert torch.equal(taken.keys[:14], slots.keys[9:])
    assert torch.equal(taken.positions[14:18], slots.positions[:4])
