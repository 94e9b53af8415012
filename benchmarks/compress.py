"""What compressing costs: seconds for 1,000 tokens, and as a share of reading, by length; and where they go.

    python benchmarks/compress.py --text book.txt --lengths 2048,8192 [--profile 12] [--json results/compress.json]

`reading` is transformers' own cache, `observed` the same with KeepCache watching, `compressing` what follows, with context
queries alone. Each length is measured --rounds times, variants in turn; medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

from keepkv import KeepCache
from keepkv.models import loading
from prose import prose
from timing import interleaved, machine, summary, write


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, help="a text file (default: documentation strings)")
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--budgets", default="10%", help="separated by commas")
    parser.add_argument("--methods", default="keepkv", help="separated by commas")
    parser.add_argument("--slot-dtype", default="float", help="auto compresses twice, with one scoring")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", type=int, metavar="ROWS", help="a table of the dearest operations of one compression")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = loading.load(args.model)
    text = args.text.read_text() if args.text else prose()
    lengths = [int(x) for x in args.lengths.split(",")]
    all_ids = tokenizer(text[: 12 * max(lengths)], return_tensors="pt", verbose=False)["input_ids"].to(model.device)
    record: dict[str, Any] = {"what": "seconds of compressing", "model": args.model, "lengths": {}}
    for tokens in lengths:
        ids = all_ids[:, :tokens]
        if ids.shape[1] < tokens:
            parser.error(f"the text has {ids.shape[1]:,} tokens: give a longer --text, or shorter --lengths")
        cache_read: dict[str, KeepCache] = {}

        def clock(run: Callable[[], Any]) -> float:
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter() - start

        def reading(cache: Any, ids: torch.Tensor = ids) -> Any:
            model(ids, past_key_values=cache, logits_to_keep=1)
            return cache

        def observed(cache_read: dict[str, KeepCache] = cache_read) -> float:
            cache_read["cache"] = KeepCache(model, slot_dtype=args.slot_dtype, auto=False)
            return clock(lambda: reading(cache_read["cache"]))

        variants: dict[str, Callable[[], float]] = {
            "reading": lambda: clock(lambda: reading(DynamicCache(config=model.config))),
            "observed": observed,
        }
        for method in args.methods.split(","):
            for budget in args.budgets.split(","):
                variants[f"compressing {method} {budget}"] = lambda budget=budget, method=method, cache_read=cache_read: clock(
                    lambda: cache_read["cache"].fork().compress(budget, method)
                )
        seconds = {name: summary(values) for name, values in interleaved(args.rounds, variants, 0).items()}
        reading_seconds = seconds["reading"]["median"]
        record["lengths"][tokens] = {
            "seconds": seconds,
            "share": {k: of["median"] / reading_seconds for k, of in seconds.items()},
        }
        for name, of in seconds.items():
            print(
                f"{tokens:7,} tokens  {name:24s} {of['median']:8.2f} s  {1e3 * of['median'] / tokens:6.2f} s for 1,000 tokens  "
                f"{of['median'] / reading_seconds:5.2f} of reading",
                flush=True,
            )
        if args.profile:
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                cache_read["cache"].fork().compress(args.budgets.split(",")[0], args.methods.split(",")[0])
            print(
                profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=args.profile, max_name_column_width=40)
            )
    write(record | machine(), args.json)


if __name__ == "__main__":
    main()
