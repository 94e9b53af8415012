"""Compiles the Triton kernel for GPUs that are not there: `python tests/attend/ahead_of_time.py`, a line of JSON per variant.

Vectors have 128 numbers, or with --all one size after the other (`make nightly`).
A process of its own, since Triton's interpreter, in which the other tests run it, replaces the compiler for good.
"""

from __future__ import annotations

import json
import sys
import warnings
from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from keepkv.attend import triton_kernels
from keepkv.slots.by_channel import TILE

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def signature(dtype: str, key_bits: int, value_bits: int) -> dict[str, str]:
    """The types of `_attend`'s arguments for queries of a dtype and slots of so many bits (0: plain)."""
    kinds = {"query": POINTERS[dtype], "bias": "*fp32", "parts": "*fp32", "masses": "*fp32", "scale": "fp32"}
    kinds |= {"bounds": "*i64", "first_tiles": "*i64", "key_lows": POINTERS[dtype]}
    for name, bits in (("key", key_bits), ("value", value_bits)):
        kinds[f"{name}s"] = "*u8" if bits else POINTERS[dtype]
        kinds[f"{name}_steps"] = "*bf16" if bits else POINTERS[dtype]
    return {name: "constexpr" if name.isupper() else kinds.get(name, "i32") for name in triton_kernels._attend.arg_names}


def compiled(dtype: str, bits: int, by_channel: bool, size: int, target: str) -> Any:
    """The kernel as `attend_slots` launches it: what Triton's compiler makes of it, or its error."""
    plan = triton_kernels.schedule(8, 4, 3200, size, 132)
    width = max(16, triton.next_power_of_2(size))
    constants = {
        "BLOCK_R": plan.block_rows, "BLOCK_N": plan.block_keys, "BLOCK_D": width, "BLOCK_V": width,
        "KEY_BITS": bits, "BY_CHANNEL": by_channel, "TILE": TILE, "VALUE_BITS": bits, "WIDEN": False,
    }  # fmt: skip
    source = ASTSource(triton_kernels._attend, signature(dtype, bits, bits), constants)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": plan.warps})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    everything, failures = "--all" in sys.argv, []
    sizes = (16, 32, 64, 80, 96, 112, 128, 192, 256) if everything else (128,)
    stored = [(0, False), *product((8, 4, 2), (True,)), *(product((8, 4), (False,)) if everything else ())]
    for dtype, (bits, by_channel), target, size in product(POINTERS, stored, TARGETS, sizes):
        try:
            failed = "" if compiled(dtype, bits, by_channel, size, target).asm else "no code"
        except Exception as error:  # the compiler has many
            failed = f"{type(error).__name__}: {error}"
        failures.append(failed)
        print(
            json.dumps(
                {"variant": f"{dtype} {'keys by channel, ' * by_channel}bits={bits} {target} size={size}", "failed": failed}
            ),
            flush=True,
        )
    if everything:
        print(json.dumps({"variants": len(failures), "failed": sum(map(bool, failures))}))
        sys.exit(any(failures))
