"""Speed on this machine, variants interleaved: reading with observation, and decoding from the compressed cache.

    python benchmarks/cpu.py --tokens 4096 --rounds 7 [--json results/cpu.json]

Compares transformers' own DynamicCache with KeepCache on the embedded model and real text. Medians and ratios; the last
line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from keepkv import KeepCache, loading
from prose import prose
from timing import interleaved, machine, write


def prefill(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> float:
    start = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - start


def decode(model: PreTrainedModel, first: torch.Tensor, cache: Cache, steps: int) -> float:
    """Tokens per second of a plain greedy loop."""
    token, start = first, time.perf_counter()
    for _ in range(steps):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return steps / (time.perf_counter() - start)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--budget", default="10%")
    parser.add_argument("--steps", type=int, default=48, help="tokens decoded per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    model, tokenizer = loading.load(args.model)
    ids = tokenizer(prose(), return_tensors="pt", verbose=False)["input_ids"][:, : args.tokens + 1].to(model.device)
    ids, first = ids[:, :-1], ids[:, -1:]

    read = KeepCache(model, args.budget, auto=False)
    plain = DynamicCache(config=model.config)
    reading = interleaved(
        args.rounds,
        {
            "plain": lambda: prefill(model, ids, DynamicCache(config=model.config)),
            "observed": lambda: prefill(model, ids, KeepCache(model, args.budget, auto=False)),
        },
    )
    prefill(model, ids, plain)
    prefill(model, ids, read)
    compact = read.fork().compress()
    report = compact.report()

    def from_plain() -> float:
        speed = decode(model, first, plain, args.steps)
        plain.crop(-args.steps)
        return speed

    decoding = interleaved(
        args.rounds,
        {
            "plain": from_plain,
            "keepkv whole": lambda: decode(model, first, read.fork().compress("100%"), args.steps),
            "keepkv compressed": lambda: decode(model, first, compact.fork(), args.steps),
        },
    )

    seconds = {name: statistics.median(values) for name, values in reading.items()}
    speeds = {name: statistics.median(values) for name, values in decoding.items()}
    ratios = [ours / theirs for ours, theirs in zip(reading["observed"], reading["plain"], strict=True)]
    faster = [ours / theirs for ours, theirs in zip(decoding["keepkv compressed"], decoding["plain"], strict=True)]
    print(f"{args.tokens} tokens, budget {args.budget}, {torch.get_num_threads()} threads, {args.rounds} rounds, medians")
    for name, value in seconds.items():
        print(f"  reading    {name:18s} {value:8.2f} s")
    for name, value in speeds.items():
        print(f"  decoding   {name:18s} {value:8.1f} tokens/s")
    print(f"  reading, observed / plain      {statistics.median(ratios):.3f}")
    print(f"  decoding, compressed / plain   {statistics.median(faster):.3f}")
    print(
        f"  compressing {report.compress_seconds:.1f} s; {report.kv_bytes_full / 1e6:.1f} MB -> {report.kv_bytes / 1e6:.1f} MB"
    )
    record = {
        "tokens": args.tokens, "budget": args.budget, "model": args.model, "rounds": args.rounds,
        "prefill_seconds": reading, "decode_tokens_per_second": decoding,
        "prefill_ratio": statistics.median(ratios), "decode_ratio": statistics.median(faster),
        "compress_seconds": report.compress_seconds, "kv_bytes": report.kv_bytes, "kv_bytes_full": report.kv_bytes_full,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **machine(),
    }  # fmt: skip
    write(record, args.json)


if __name__ == "__main__":
    main()
