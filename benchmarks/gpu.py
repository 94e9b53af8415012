"""Speed on a CUDA GPU, with nothing downloaded: the kernel's tests, the kernel beside the copy bandwidth, decoding of a model.

    PYTHONPATH=src python benchmarks/gpu.py OUT            (made for under eight minutes)
    PYTHONPATH=src python benchmarks/gpu.py OUT --tiny     (the same code at toy sizes on a CPU, in Triton's interpreter)

Needs torch >= 2.11, triton 3.6 and transformers; the kernel's tests also pytest, typer and rich, and are left out without.
Writes OUT/tests.log and OUT/gpu.json, after every step; times are medians and quartiles in seconds. `kernel`: one layer's
attention over slots at batch 1, 16 and 64, ragged heads of 3,200 slots on average, 8 KV heads of size 128, 32 query heads:
with its votes, with votes of nought (the same loads), in 8 and 4 bits, with votes in spare dimensions of the keys and stock
flash attention; and the bytes it must read over the bandwidth of a large copy on the same GPU. The rest is a randomly
initialized model of Llama-3.1-8B's shape in bfloat16 at 32,768 tokens: `decode`, one step at batch 16 or the largest that
fits: keepkv at 10%, DynamicCache as small, and whole (at the end once more with Qwen3-8B's shape); `fitting`, tokens per
second with the largest batches that fit into what memory is free, at 10% and whole; `compression`, reading a random prompt
plainly, reading it observed, and compressing it to 10%; `sweep`, tokens per second at 2,048 to 131,072 tokens, batch 1, 16
and 64, budgets of 50 to 5%. The caches' content is random: only speed is measured. Not run on a GPU yet when this was
written: only with --tiny.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen3Config

from filled import compact, dense, ragged, timed
from keepkv import KeepCache
from keepkv.attend import bias_in_keys
from keepkv.attend.dispatch import attend_slots, backend_for
from keepkv.slots.slot_dtype import SLOT_DTYPES
from throughput import fitting, measured
from timing import interleaved, machine, ratio, summary, write

FULL = {"batches": (1, 16, 64), "mean": 3200, "heads": 8, "group": 4, "size": 128, "copy": 1 << 30, "rounds": 30}
TINY = {"batches": (1, 2), "mean": 40, "heads": 2, "group": 2, "size": 64, "copy": 1 << 20, "rounds": 2}
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
QWEN = {**SHAPE, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936, "head_dim": 128}
TOY = {**SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "vocab_size": 97}  # fmt: skip


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
        quantized = {
            name: replace(slots, keys=slot_dtype.store(slots.keys[:]), values=slot_dtype.store(slots.values[:]))
            for name, slot_dtype in SLOT_DTYPES.items()
            if slot_dtype.bits
        }
        for name, of in {"votes": slots, "no votes": level, **quantized}.items():
            variants[name] = timed(partial(attend_slots, query, of, 0.1, "triton"), device)
        try:  # it has never run on a GPU
            bias_in_keys_run = partial(attend_slots, query, bias_in_keys.widen(slots, 0.1), 0.1, "bias_in_keys")
            torch.testing.assert_close(bias_in_keys_run(), attend_slots(query, slots, 0.1, "eager"), rtol=0.02, atol=0.02)
            variants["bias in keys"] = timed(bias_in_keys_run, device)
        except Exception as error:
            record["bias in keys"] = f"{type(error).__name__}: {error}"
        variants["eager"] = timed(partial(attend_slots, query, slots, 0.1, "eager"), device)
        times = interleaved(sizes["rounds"], variants, 3)
        bytes_read = {
            name: sum(x.nbytes for x in of.tensors) - of.positions.nbytes for name, of in {"votes": slots, **quantized}.items()
        }
        share = {name: size / summary(times[name])["median"] / bandwidth for name, size in bytes_read.items()}
        record["batches"][batch] = {
            "slots": len(slots.keys), "bytes": bytes_read, "seconds": {name: summary(of) for name, of in times.items()},
            "share_of_copy_bandwidth": share,
        }  # fmt: skip
        shares = ", ".join(f"{name} {of:.2f}" for name, of in share.items())
        print(f"  batch {batch:3d}: of the copy bandwidth: {shares}; microseconds:", end="")
        print("", *(f"{name} {1e6 * summary(of)['median']:.1f}" for name, of in times.items()), sep="  ", flush=True)
    return record


def random_model(shape: dict[str, int], device: torch.device, dtype: torch.dtype, config: Any = LlamaConfig) -> Any:
    """A randomly initialized model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = AutoModelForCausalLM.from_config(config(**shape), attn_implementation="sdpa").eval()
    finally:
        torch.set_default_dtype(before)
    return model


def decode(model: Any, tokens: int, batch: int, steps: int) -> dict[str, Any]:
    """One step with each kind of cache. Halves the batch until everything fits."""
    while True:
        try:
            return {"batch": batch, "tokens": tokens, "slots": tokens // 10, **_steps(model, batch, tokens, steps)}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2  # here, where the error holds no tensors any more
        torch.cuda.empty_cache()


def _steps(model: Any, batch: int, tokens: int, steps: int) -> dict[str, Any]:
    token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    record: dict[str, Any] = {}
    times: dict[str, list[float]] = {}
    # the two small caches in turn; the whole one by itself, as it leaves no room
    both = {"keepkv": compact(model, batch, tokens, tokens // 10), "small": dense(model, batch, tokens // 10)}
    step = {name: timed(partial(model, token, past_key_values=cache), model.device) for name, cache in both.items()}
    times |= interleaved(steps, step, 3)
    del both, step
    full_cache = dense(model, batch, tokens)
    times |= interleaved(steps, {"full": timed(lambda: model(token, past_key_values=full_cache), model.device)}, 3)
    record["seconds"] = {name: summary(values) for name, values in times.items()}
    record["keepkv / small"] = ratio(times["small"], times["keepkv"])
    record["keepkv / full"] = summary(times["full"])["median"] / summary(times["keepkv"])["median"]
    for name, of in record["seconds"].items():
        print(f"  {name:8s} {1e3 * of['median']:8.2f} ms a step", flush=True)
    return record


def largest_batches(model: Any, tokens: int, steps: int, free: float) -> dict[str, Any]:
    """Tokens per second with as many rows as fit into `free` bytes, of caches whole and at 10%."""
    results = {name: fitting(model, tokens, share, free, steps) for name, share in (("full", 1.0), ("keepkv", 0.1))}
    for name, of in results.items():
        print(f"  {name:8s} batch {of['batch']:4d}  {of['tokens_per_second']:8.1f} tokens/s", flush=True)
    return results


def sweep(model: Any, lengths: tuple[int, ...], batches: tuple[int, ...], free: float, steps: int) -> dict[str, Any]:
    """Tokens per second by length, batch and budget, of caches up to half of `free`: all five must be there at once."""
    results: dict[str, Any] = {}
    for tokens in lengths:
        for batch in batches:
            name = f"{tokens} x {batch}"
            try:
                results[name] = measured(model, batch, tokens, [0.5, 0.25, 0.1, 0.05], False, free / 2, steps)
            except torch.OutOfMemoryError as error:
                results[name] = {}
                print(f"  {name}: {error}", flush=True)
            else:
                print(f"  {name}:", *(f"{key} {of['tokens_per_second']:.1f}" for key, of in results[name].items()), sep="  ")
    return results


def compression(model: Any, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of reading one prompt, of reading it observed, and of compressing it with context queries."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    caches: list[KeepCache] = []

    def observed() -> None:
        caches[:] = [KeepCache(model, auto=False)]
        model(ids, past_key_values=caches[0], logits_to_keep=1)

    variants = {
        "reading": lambda: model(ids, past_key_values=DynamicCache(), logits_to_keep=1),
        "observed": observed,
        "compressing": lambda: caches[0].fork().compress("10%"),
    }
    times = interleaved(rounds, {name: timed(run, model.device) for name, run in variants.items()}, 1)
    seconds = {name: summary(values) for name, values in times.items()}
    for name, of in seconds.items():
        print(f"  {name:12s} {of['median']:8.3f} s, {of['median'] / seconds['reading']['median']:.2f} of reading", flush=True)
    return {"tokens": tokens, "seconds": seconds}


def run_tests(root: Path, log_file: Path, tiny: bool) -> int | str:
    """The status of the kernel's tests, or why there is none."""
    missing = [name for name in ("pytest", "typer", "rich") if find_spec(name) is None]
    if missing:
        return f"left out, without {', '.join(missing)}"
    command = [sys.executable, "-m", "pytest", "-q", "tests/attend/test_triton_kernels.py"]
    if tiny:
        command += ["-k", "schedules or alone"]
    paths = [str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        with log_file.open("w") as log:
            return subprocess.run(command, cwd=root, stdout=log, stderr=log, timeout=240, env=environment).returncode
    except subprocess.TimeoutExpired:
        return "timed out"


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

        from attend.interpreter import patched

        interpreter._patch_lang_tensor = patched()
    device, dtype = torch.device("cpu" if args.tiny else "cuda"), torch.float32 if args.tiny else torch.bfloat16
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {**machine(), "tiny": args.tiny, "backend": str(backend_for(device, dtype, 128))}

    record["tests"] = run_tests(root, args.out / "tests.log", args.tiny)
    print(f"tests: {record['tests']}", flush=True)
    tokens, free = (40, 1e5) if args.tiny else (32768, 0.6 * torch.cuda.mem_get_info()[0])
    steps, lengths, batches = (2, (40,), (1, 2)) if args.tiny else (5, (2048, 8192, 32768, 131072), (1, 16, 64))
    phases: dict[str, Callable[[Any], dict[str, Any]]] = {
        "kernel": lambda _: kernel(TINY if args.tiny else FULL, device, dtype),
        "decode": lambda model: decode(model, tokens, *((2, 2) if args.tiny else (16, 20))),
        "fitting": lambda model: largest_batches(model, tokens, steps, free),
        "compression": lambda model: compression(model, 20 * tokens if args.tiny else tokens, 1 if args.tiny else 3),
        "sweep": lambda model: sweep(model, lengths, batches, free, steps),
        "decode, Qwen3's shape": lambda model: decode(model, tokens, *((2, 2) if args.tiny else (16, 20))),
    }
    model: Any = random_model(TOY if args.tiny else SHAPE, device, dtype)
    for name, run in phases.items():
        print(name, flush=True)
        if "Qwen3" in name:
            model = None  # its memory, before the next one's
            model = random_model({**TOY, "head_dim": 16} if args.tiny else QWEN, device, dtype, Qwen3Config)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            record[name] = run(model)
        except Exception as error:  # what was measured before is worth keeping
            record[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"  {record[name]['error']}", flush=True)
        write(record, args.out / "gpu.json")


if __name__ == "__main__":
    main()
