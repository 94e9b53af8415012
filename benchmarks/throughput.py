"""Tokens per second while decoding, by length, batch and budget, and with the largest batch that fits into a memory.

    python benchmarks/throughput.py --lengths 2048,8192 --batches 1,4,16 --memory 2 [--json results/throughput.json]

Caches are filled at random: speed does not depend on what they hold. `full` is transformers' DynamicCache with all tokens; a
budget is KeepCache with so many slots per head on average, heads of different lengths; `small`, for comparison, is DynamicCache
with as many. A variant that would take more than --most is left out. Steps are interleaved; medians.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from filled import compact, dense, kv_bytes, shape, timed
from keepkv.models import loading
from timing import interleaved, machine, summary, write


def measured(
    model: Any, batch: int, tokens: int, shares: list[float], small: bool, most_bytes: float, steps: int
) -> dict[str, Any]:
    """Tokens per second and bytes of each cache of that length and batch."""
    layers, heads, size = shape(model)
    full_bytes = 2 * batch * layers * heads * tokens * size * model.dtype.itemsize
    caches: dict[str, Any] = {"full": dense(model, batch, tokens)} if full_bytes <= most_bytes else {}
    for share in shares:
        slots = max(4, int(share * tokens))
        if share * full_bytes <= most_bytes:
            caches[f"{share:.0%}"] = compact(model, batch, tokens, slots)
            if small:
                caches[f"small {share:.0%}"] = dense(model, batch, slots)
    bytes_of = {name: kv_bytes(cache) for name, cache in caches.items()}
    token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    run = {name: timed(partial(model, token, past_key_values=cache), model.device) for name, cache in caches.items()}
    times = interleaved(steps, run, 2)
    return {
        name: {"tokens_per_second": batch / summary(values)["median"], "bytes": bytes_of[name], "seconds": summary(values)}
        for name, values in times.items()
    }


def fitting(model: Any, tokens: int, share: float, memory: float, steps: int) -> dict[str, Any]:
    """Tokens per second with as many rows as the memory holds of such caches (share 1: transformers' own)."""
    layers, heads, size = shape(model)
    bytes_of_row = 2 * layers * heads * size * model.dtype.itemsize * tokens * share
    bytes_of_row += 0 if share == 1 else 8 * layers * heads * tokens * share  # votes and positions
    batch = int(memory / bytes_of_row)
    if not batch:
        return {"batch": 0, "tokens_per_second": 0.0}
    slots = int(share * tokens)
    cache = dense(model, batch, tokens) if share == 1 else compact(model, batch, tokens, slots)
    cache_bytes = kv_bytes(cache)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    times = interleaved(steps, {"": timed(partial(model, token, past_key_values=cache), model.device)}, 2)[""]
    return {
        "batch": batch,
        "bytes": cache_bytes,
        "tokens_per_second": batch / summary(times)["median"],
        "seconds": summary(times),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--budgets", default="50,25,10,5", help="percent")
    parser.add_argument("--small", action="store_true", help="also equally small dense caches")
    parser.add_argument("--memory", type=float, default=2, help="GB for caches, for the largest batch that fits")
    parser.add_argument("--most", type=float, default=7, help="GB of the largest cache that is tried")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, _ = loading.load(args.model)
    lengths, batches = ([int(x) for x in text.split(",")] for text in (args.lengths, args.batches))
    shares = [float(x) / 100 for x in args.budgets.split(",")]
    record: dict[str, Any] = {"what": "tokens per second while decoding", "model": args.model, "decode": {}, "fitting": {}}
    for tokens in lengths:
        for batch in batches:
            results = measured(model, batch, tokens, shares, args.small, args.most * 1e9, args.steps)
            record["decode"][f"{tokens} x {batch}"] = results
            cells = [f"{name} {of['tokens_per_second']:7.1f} ({of['bytes'] / 1e6:,.0f} MB)" for name, of in results.items()]
            print(f"{tokens:7,} tokens, batch {batch:3d}   " + "   ".join(cells), flush=True)
        for share in (1.0, *shares):
            of = record["fitting"][f"{tokens}, {share:.0%}"] = fitting(model, tokens, share, args.memory * 1e9, args.steps)
            print(
                f"{tokens:7,} tokens, {share:4.0%} in {args.memory:g} GB: batch {of['batch']}, "
                f"{of['tokens_per_second']:.1f} tokens/s",
                flush=True,
            )
    write(record | {"memory": args.memory * 1e9, **machine()}, args.json)


if __name__ == "__main__":
    main()
