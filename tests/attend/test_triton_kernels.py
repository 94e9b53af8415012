"""The Triton kernel: in Triton's interpreter on a CPU, and on a GPU where there is one. Truth is `exact` in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from attend import interpreter
from keepkv.attend.dispatch import attend_slots, backend_for
from keepkv.attend.states import exact
from keepkv.errors import BackendError
from keepkv.slots.by_channel import QuantizedByChannel
from keepkv.slots.by_vector import QuantizedByVector
from keepkv.slots.slot_dtype import SLOT_DTYPES
from keepkv.slots.slots import Slots

pytest.importorskip("triton")
from keepkv.attend import triton_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COUNTS = [0, 1, 15, 63, 255, 1000]  # in one launch


@pytest.fixture(autouse=True)
def _loops_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.runtime.interpreter._patch_lang_tensor", interpreter.patched())


def case(
    size: int, value_size: int, rows: int, dtype: torch.dtype, batch: int = 3, counts: tuple[int, ...] | list[int] = COUNTS
) -> tuple[torch.Tensor, Slots]:
    """A strided query and slots, some of them hidden by a bias of -inf, and one head's all."""
    generator = torch.Generator().manual_seed(size + rows)
    total, heads = sum(counts), len(counts) // batch

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    bias = (torch.rand(total, generator=generator) * 5).to(DEVICE)
    bias[3:10], bias[:1] = -torch.inf, -torch.inf
    positions = torch.arange(total, dtype=torch.int32, device=DEVICE)
    slots = Slots(randn(total, size), randn(total, value_size), bias, positions, (0, *accumulate(counts)))
    return randn(batch, rows, heads, size + 8)[..., :size].transpose(1, 2), slots


def errors(query: torch.Tensor, slots: Slots, got: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float, float]:
    """Against float64: the largest error of the output, of plain attention in the same dtype, and of the log-sum-exp."""
    ours = eager = mass = 0.0
    flat = zip(query.flatten(0, 1), slots.per_head, got[0].flatten(0, 1), got[1].flatten(0, 1), strict=True)
    for own, (keys, values, bias), output, log_mass in flat:
        if not len(bias) or bool(bias.eq(-torch.inf).all()):
            assert torch.equal(output, torch.zeros_like(output))
            assert log_mass.eq(-torch.inf).all()
            continue
        truth, true_mass = exact(own.double(), keys.double(), values.double(), bias.double(), 0.2)
        ours = max(ours, float((output - truth).abs().max()))
        eager = max(eager, float((exact(own, keys, values, bias.to(own.dtype), 0.2)[0].double() - truth).abs().max()))
        mass = max(mass, float((log_mass - true_mass).abs().max()))
    return ours, eager, mass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("size", "value_size", "rows"), [(64, 64, 3), (80, 80, 1), (96, 64, 4), (128, 128, 8), (256, 256, 4), (16, 24, 70)]
)
def test_ragged_heads_in_one_launch(size: int, value_size: int, rows: int, dtype: torch.dtype, monkeypatch) -> None:
    """No worse than plain attention in the same dtype; every element is written."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    query, slots = case(size, value_size, rows, dtype)
    got = attend_slots(query, slots, 0.2, "triton")
    assert got[0].dtype == got[1].dtype == torch.float32
    ours, eager, mass = errors(query, slots, got)
    assert ours <= eager + 1e-5
    assert mass <= 1e-4


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "keys by vector"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "value_size", "rows"), [(64, 64, 3), (80, 96, 1), (17, 24, 20), (256, 256, 4)])
def test_quantized_slots_are_read_as_they_are_stored(
    name: str, size: int, value_size: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exact as plain slots that hold what is read; but the query is turned, and rounded once more."""
    query, plain = case(size, value_size, rows, dtype)
    if name == "keys by vector":  # as in files of format 4
        slots = replace(plain, keys=QuantizedByVector.of(plain.keys, 4), values=QuantizedByVector.of(plain.values, 4))
    else:
        slots = SLOT_DTYPES[name].stored(plain)
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedByVector, "unrotated", None)
        patch.setattr(QuantizedByChannel, "unrotated", None)
        got = attend_slots(query, slots, 0.2, "triton")
    ours, eager, mass = errors(query, slots.read(), got)
    room = 2 if dtype == torch.bfloat16 else 1
    assert ours <= room * eager + 1e-5
    assert mass <= (0.05 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_stretches_do_not_change_the_answer_and_repeat_bit_for_bit(splits: int, batch: int) -> None:
    query, slots = case(64, 64, 3, torch.float32, batch)
    plan = triton_kernels.Schedule(16, 32, splits, 4)
    got = triton_kernels.attend_slots(query, slots, 0.2, plan)
    assert max(errors(query, slots, got)[::2]) <= 1e-5
    again = triton_kernels.attend_slots(query, slots, 0.2, plan)
    assert torch.equal(got[0], again[0])
    assert torch.equal(got[1], again[1])


def test_a_row_is_as_if_alone() -> None:
    query, slots = case(64, 64, 3, torch.float32)
    together = attend_slots(query, slots, 0.2, "triton")
    alone = attend_slots(query[1:2], slots.rows([1], 2), 0.2, "triton")
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours[1:2], theirs, rtol=1e-5, atol=1e-5)


def test_schedules_fill_the_machine_and_no_more() -> None:
    for heads, rows, longest, size, processors in ((8, 4, 3200, 128, 132), (512, 4, 3200, 128, 132), (3, 6000, 100, 256, 1)):
        block_rows, block_keys, splits, _ = triton_kernels.schedule(heads, rows, longest, size, processors)
        assert block_rows >= 16
        assert block_rows & (block_rows - 1) == block_keys & (block_keys - 1) == 0
        programs = heads * -(-rows // block_rows)
        assert splits == 1 or (splits - 1) * programs < 2 * processors
        assert (splits - 1) * 4 * block_keys < longest
    assert triton_kernels.schedule(8, 4, 3200, 128, 132).splits > 8
    assert triton_kernels.schedule(512, 4, 3200, 128, 132).splits == 1


def test_the_kernel_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_kernels.trial(DEVICE, torch.float32, 64, 64) == ""
    triton_kernels.trial.cache_clear()
    monkeypatch.setattr(triton_kernels, "attend_slots", lambda query, slots, scale: (query * 2, query[..., 0] * 2))
    assert "something else" in triton_kernels.trial(DEVICE, torch.float32, 64, 64)
    triton_kernels.trial.cache_clear()
    monkeypatch.setattr(triton_kernels, "attend_slots", None)
    assert "TypeError" in triton_kernels.trial(DEVICE, torch.float32, 64, 64)
    triton_kernels.trial.cache_clear()


def test_auto_is_by_device_and_the_kernel_refuses_what_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in silence: why the fast backend is not taken is said once, but for float64, which nobody takes for speed."""
    cuda = torch.device("cuda")
    backend_for.cache_clear()
    monkeypatch.setattr(triton_kernels, "trial", lambda *what: "")
    assert backend_for(cuda, torch.bfloat16, 128) == ("triton", "")
    backend_for.cache_clear()
    monkeypatch.setattr(triton_kernels, "trial", lambda *what: "is broken here")
    with pytest.warns(UserWarning, match="slow backend 'eager': the attention backend 'triton' is broken here"):
        assert backend_for(cuda, torch.bfloat16, 128) == ("eager", "triton is broken here")
    backend_for(cuda, torch.bfloat16, 128)  # no second warning
    backend_for.cache_clear()
    assert backend_for(cuda, torch.float64, 128).name == "eager"
    with pytest.warns(UserWarning, match="sizes up to 256, not 512"):
        assert backend_for(cuda, torch.bfloat16, 512).name == "eager"
    query, slots = case(64, 64, 1, torch.float32)
    with pytest.raises(BackendError, match="float64"):
        attend_slots(query.double(), slots, 1.0, "triton")


def test_it_compiles_for_gpus_that_are_not_there() -> None:
    """Every dtype and slot format: the interpreter, which has no types, took a kernel that no GPU's compiler takes."""
    bare = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "ahead_of_time.py"
    said = subprocess.run([sys.executable, script], env=bare, capture_output=True, text=True, check=True).stdout
    variants = [json.loads(line) for line in said.splitlines()]
    assert len(variants) == 36
    assert [variant for variant in variants if variant["failed"]] == []


def test_without_cuda_or_interpreter_it_says_so() -> None:
    code = (
        "import torch\nfrom keepkv.attend.dispatch import attend_slots\nfrom keepkv.slots.slots import Slots\n"
        "e = torch.zeros(0, 8)\n"
        "try: attend_slots(torch.zeros(1, 1, 1, 8), Slots(e, e, e[:, 0], e[:, 0].int(), (0, 0)), 1.0, 'triton')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "import sys; print('triton' in sys.modules)"
    )
    bare = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True).stdout
    assert "BackendError" in said
    assert "runs on CUDA, not on cpu" in said
    assert said.strip().endswith("False")
