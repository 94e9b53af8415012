"""Drift: does the error of many folds add up while a model writes, and does refreshing from exact keys and values help?

    python benchmarks/drift.py TEXT --tokens 4000 --budget 512 --period 256 --refresh 1024 -o drift.json

The full cache reads 2,000 tokens of TEXT and writes on (sampled, temperature 0.8). What it wrote is then fed to live caches,
one without and one with a backing, and their next-token distributions are compared with the full cache's, 500 at a time: mean
KL divergence in nats, and the seconds that compressions and refreshes took.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from keepkv import KeepCache
from keepkv.eval.drift import WINDOW, follow, generate
from keepkv.models import loading
from keepkv.text import file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--budget", default="512")
    parser.add_argument("--period", type=int, default=256)
    parser.add_argument("--refresh", type=int, default=1024)
    parser.add_argument("--methods", default="keepkv,snapkv")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--slot-dtype", default="float")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    model, tokenizer = loading.load(args.model)
    ids = tokenizer(file.read_text(args.text), return_tensors="pt", verbose=False)["input_ids"][:, :2000]
    words, truth = generate(model, ids, args.tokens)
    result: dict[str, Any] = {name: str(value) for name, value in vars(args).items()}
    for method in args.methods.split(","):
        for name, options in (("folds", {}), ("refresh", {"backing": "cpu", "refresh": args.refresh})):
            cache = KeepCache(model, args.budget, method, period=args.period, slot_dtype=args.slot_dtype, **options)
            loss, _ = follow(model, ids, words, truth, cache)
            report = cache.report()
            record = result[f"{method}, {name}"] = {
                "kl": [float(part.mean()) for part in loss.split(WINDOW)], "compressions": report.compressions,
                "compress_seconds": report.compress_seconds, "longest_pause": report.longest_pause,
                "kv_bytes": report.kv_bytes, "backing_bytes": report.backing_bytes,
            }  # fmt: skip
            curve = " ".join(f"{kl:.4f}" for kl in record["kl"])
            print(f"{method:8} {name:8} KL {curve}  compressing {record['compress_seconds']:.0f} s", flush=True)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
