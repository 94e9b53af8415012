"""Soak: memory that stays put while a very long text is read in chunks, or very much is written.

    python benchmarks/soak.py read TEXT --tokens 100000 --budget 2048 --chunk 2048 -o read.json
    python benchmarks/soak.py write TEXT --tokens 20000 --budget 512 --period 512 -o write.json

Prints, every so many tokens, the bytes that the cache holds (slots and tail), those of the queries it remembers, the process's
resident memory, and the speed since the last line; the JSON holds all of them, with the longest pause for a compression.
read goes through TEXT again and again until there are enough tokens. write reads 2,000 tokens of it and goes on sampling.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from keepkv import KeepCache
from keepkv.models import loading
from keepkv.text import file


def resident() -> int:
    """Bytes of this process in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Log:
    """Lines of what was held, and the peaks between them."""

    def __init__(self, interval: int) -> None:
        self.interval, self.rows, self.start, self.last = interval, [], time.perf_counter(), 0
        self.peak_kv = self.peak_watch = self.peak_resident = 0

    def see(self, cache: KeepCache, tokens: int) -> None:
        report = cache.report()
        self.peak_kv, self.peak_watch = max(self.peak_kv, report.kv_bytes), max(self.peak_watch, report.watch_bytes)
        self.peak_resident = max(self.peak_resident, resident())
        if tokens - self.last < self.interval:
            return
        now = time.perf_counter()
        row = {
            "tokens": tokens, "kv_mb": self.peak_kv / 1e6, "full_mb": report.kv_bytes_full / 1e6,
            "queries_mb": self.peak_watch / 1e6, "resident_mb": self.peak_resident / 1e6,
            "tokens_per_second": (tokens - self.last) / (now - self.start), "compressions": report.compressions,
            "longest_pause": report.longest_pause, "compress_seconds": report.compress_seconds,
        }  # fmt: skip
        self.rows.append(row)
        print("  ".join(f"{name} {value:,.1f}" for name, value in row.items()), file=sys.stderr, flush=True)
        self.start, self.last, self.peak_kv, self.peak_watch, self.peak_resident = now, tokens, 0, 0, 0


@torch.inference_mode()
def reading(model: Any, ids: torch.Tensor, tokens: int, budget: str, chunk: int, references: int, log: Log) -> KeepCache:
    ids = ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
    cache = KeepCache(model, budget, chunk=chunk, references=references)
    attend, layers = cache._attention, cache.keep_layers

    def spy(layer: int, *args: Any, **kwargs: Any) -> torch.Tensor:  # memory is largest before a chunk is compressed
        output: torch.Tensor = attend(layer, *args, **kwargs)
        if layers[-1].is_initialized:
            log.see(cache, cache.get_seq_length() if cache.layers[layer] is layers[-1] else log.last)
        return output

    cache._attention = spy  # type: ignore[method-assign]
    return cache.read(model, ids)


@torch.inference_mode()
def writing(model: Any, ids: torch.Tensor, tokens: int, budget: str, period: int, references: int, log: Log) -> KeepCache:
    torch.manual_seed(0)
    cache = KeepCache(model, budget, period=period, references=references)
    logits = model(ids[:, :2000], past_key_values=cache, logits_to_keep=1).logits
    for step in range(1, tokens + 1):
        word = torch.multinomial((logits[:, -1].float() / 0.8).softmax(-1), 1)
        logits = model(word, past_key_values=cache).logits
        log.see(cache, step)
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["read", "write"])
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--budget", default="2048")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--period", type=int, default=512)
    parser.add_argument("--references", type=int, default=2048, help="queries remembered per layer: memory and time")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    model, tokenizer = loading.load(args.model)
    ids = tokenizer(file.read_text(args.text), return_tensors="pt", verbose=False)["input_ids"]
    log = Log(args.chunk * 5 if args.what == "read" else 1000)
    if args.what == "read":
        cache = reading(model, ids, args.tokens, args.budget, args.chunk, args.references, log)
    else:
        cache = writing(model, ids, args.tokens, args.budget, args.period, args.references, log)
    report = cache.report()
    summary = {
        **{name: str(value) for name, value in vars(args).items()}, "threads": torch.get_num_threads(),
        "kv_bytes": report.kv_bytes, "kv_bytes_full": report.kv_bytes_full, "longest_pause": report.longest_pause,
        "compress_seconds": report.compress_seconds, "rows": log.rows,
    }  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(summary, indent=1))
    print(json.dumps({name: value for name, value in summary.items() if name != "rows"}))


if __name__ == "__main__":
    main()
