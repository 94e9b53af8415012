"""Speed on a CUDA GPU, with nothing downloaded: the kernel's tests, the kernel beside the copy bandwidth, decoding of a model.

    python benchmarks/gpu.py OUT            (torch >= 2.11, triton 3.6, transformers, pytest; made for under eight minutes)
    python benchmarks/gpu.py OUT --tiny     (the same code at toy sizes on a CPU, the kernel in Triton's interpreter)

Writes OUT/tests.log and OUT/gpu.json, after every step; times are medians and quartiles in seconds. `kernel`: one layer's
attention over slots at batch 1, 16 and 64, ragged heads of 3,200 slots on average, 8 KV heads of size 128, 32 query heads, with
its votes and with votes of nought (the same loads), and the bytes it must read over the bandwidth of a large copy on the same
GPU. `decode`: one step of a randomly initialised model of Llama-3.1-8B's shape in bfloat16, 32,768 tokens, batch 16 or the
largest that fits: keepkv at 10%, DynamicCache as small, and whole. The caches' content is random: only speed is measured.
Not run on a GPU yet when this was written: only with --tiny.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from keepkv import KeepCache
from keepkv.attention import attend_slots, backend_for
from keepkv.types import Slots
from timing import interleaved, machine, ratio, summary, write

FULL = {"batches": (1, 16, 64), "mean": 3200, "heads": 8, "group": 4, "size": 128, "copy": 1 << 30, "rounds": 30}
TINY = {"batches": (1, 2), "mean": 40, "heads": 2, "group": 2, "size": 64, "copy": 1 << 20, "rounds": 2}
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
TOY = {**SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "vocab_size": 97}  # fmt: skip


def ragged(batch: int, heads: int, mean: int, size: int, like: torch.Tensor) -> Slots:
    """Random slots of `mean` per head on average, from a fifth to nine fifths of it."""
    draw = torch.rand(batch * heads, generator=torch.Generator().manual_seed(0))
    counts = ((0.2 + 1.6 * draw / draw.mean() / 2) * mean).int().tolist()
    total = sum(counts)
    keys, values = (torch.randn(total, size, device=like.device, dtype=like.dtype) for _ in range(2))
    positions = torch.arange(total, device=like.device, dtype=torch.int32)
    return Slots(keys, values, torch.rand(total, device=like.device), positions, (0, *accumulate(counts)))


def timed(run: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """What returns the seconds of one run, by the device's clock where it has one."""

    def clock() -> float:
        if device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    return clock


def kernel(sizes: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    source = torch.randint(0, 255, (sizes["copy"],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = interleaved(sizes["rounds"], {"copy": timed(lambda: target.copy_(source), device)}, 3)["copy"]
    bandwidth = 2 * sizes["copy"] / summary(copying)["median"]
    record: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "batches": {}}
    for batch in sizes["batches"]:
        query = torch.randn(batch, sizes["heads"], sizes["group"], sizes["size"], device=device, dtype=dtype)
        slots = ragged(batch, sizes["heads"], sizes["mean"], sizes["size"], query)
        level = replace(slots, bias=torch.zeros_like(slots.bias))
        variants: dict[str, Callable[[], float]] = {}
        for name, of in (("votes", slots), ("no votes", level)):
            variants[name] = timed(partial(attend_slots, query, of, 0.1, "triton"), device)
        variants["reference"] = timed(partial(attend_slots, query, slots, 0.1, "reference"), device)
        times = interleaved(sizes["rounds"], variants, 3)
        read = slots.keys.nbytes + slots.values.nbytes + slots.bias.nbytes
        median = summary(times["votes"])["median"]
        record["batches"][batch] = {
            "slots": len(slots.keys), "bytes": read, "seconds": {name: summary(of) for name, of in times.items()},
            "share_of_copy_bandwidth": read / median / bandwidth,
        }  # fmt: skip
        print(f"  batch {batch:3d}: {1e6 * median:8.1f} us, {read / median / bandwidth:.2f} of the copy bandwidth", flush=True)
    return record


def decode(
    shape: dict[str, int], tokens: int, batch: int, steps: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """One step with each kind of cache. Halves the batch until everything fits."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).eval()
    finally:
        torch.set_default_dtype(before)
    heads, size = shape["num_key_value_heads"], shape["hidden_size"] // shape["num_attention_heads"]
    slots = max(4, tokens // 10)
    while True:
        try:
            return {"batch": batch, "tokens": tokens, "slots": slots, **_steps(model, batch, tokens, slots, heads, size, steps)}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2  # here, where the error holds no tensors any more
        torch.cuda.empty_cache()


def _steps(model: Any, batch: int, tokens: int, slots: int, heads: int, size: int, steps: int) -> dict[str, Any]:
    like = model.lm_head.weight
    token = torch.zeros(batch, 1, dtype=torch.int64, device=like.device)

    def dense(count: int) -> DynamicCache:
        cache = DynamicCache()
        for index in range(len(model.model.layers)):
            state = torch.randn(batch, heads, count, size, device=like.device, dtype=like.dtype)
            cache.update(state, state.clone(), index)
        return cache

    compact = KeepCache(model, "50%", "streaming")
    model(token.expand(-1, 16), past_key_values=compact, logits_to_keep=1)
    for layer in compact.keep_layers:
        layer.slots, layer.seen = ragged(batch, heads, slots, size, like), tokens
        layer.keys, layer.values = layer.keys[:, :, :0].clone(), layer.values[:, :, :0].clone()
    record: dict[str, Any] = {}
    times: dict[str, list[float]] = {}
    # the two small caches in turn; the whole one by itself, as it leaves no room
    small = dense(slots)
    both = {"keepkv": compact, "small": small}
    step = {name: timed(lambda cache=cache: model(token, past_key_values=cache), like.device) for name, cache in both.items()}
    times |= interleaved(steps, step, 3)
    del compact, small, both, step
    whole = dense(tokens)
    times |= interleaved(steps, {"full": timed(lambda: model(token, past_key_values=whole), like.device)}, 3)
    record["seconds"] = {name: summary(values) for name, values in times.items()}
    record["keepkv / small"] = ratio(times["small"], times["keepkv"])
    record["keepkv / full"] = summary(times["full"])["median"] / summary(times["keepkv"])["median"]
    for name, of in record["seconds"].items():
        print(f"  {name:8s} {1e3 * of['median']:8.2f} ms a step", flush=True)
    return record


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="toy sizes on a CPU")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA here: --tiny runs the same code at toy sizes on a CPU")
    root = Path(__file__).parent.parent
    if args.tiny:
        if os.environ.get("TRITON_INTERPRET") != "1":  # Triton must find it when it is imported
            os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
        sys.path.insert(0, str(root / "tests"))
        from triton.runtime import interpreter

        from interpreter import patched

        interpreter._patch_lang_tensor = patched()
    device, dtype = torch.device("cpu" if args.tiny else "cuda"), torch.float32 if args.tiny else torch.bfloat16
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {**machine(), "tiny": args.tiny, "backend": backend_for(device, dtype, 128)}

    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/test_kernels.py",
        *(["-k", "schedules or alone"] if args.tiny else []),
    ]
    seen = os.environ.get("PYTHONPATH")
    paths = str(root / "src") + (os.pathsep + seen if seen else "")
    try:
        with (args.out / "tests.log").open("w") as log:
            record["tests"] = subprocess.run(
                command, cwd=root, stdout=log, stderr=log, timeout=240, env={**os.environ, "PYTHONPATH": paths}
            ).returncode
    except subprocess.TimeoutExpired:
        record["tests"] = "timed out"
    print(f"tests: {record['tests']}", flush=True)
    for name, run in (
        ("kernel", lambda: kernel(TINY if args.tiny else FULL, device, dtype)),
        ("decode", lambda: decode(*((TOY, 40, 2, 2) if args.tiny else (SHAPE, 32768, 16, 20)), device, dtype)),
    ):
        print(name, flush=True)
        try:
            record[name] = run()
        except Exception as error:  # what was measured before is worth keeping
            record[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"  {record[name]['error']}", flush=True)
        write(record, args.out / "gpu.json")


if __name__ == "__main__":
    main()
