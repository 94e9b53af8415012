"""Decoding speed: the compressed cache beside transformers' own, as long as the text, and as small as the compressed one.

    python benchmarks/decode.py --tokens 8192 --budgets 10% --threads 1 [--text book.txt] [--json results/decode.json]

Reads a text once, compresses it to each budget, and then decodes one token with every cache in turn, so that all meet the
same noise: `full` is DynamicCache with all tokens, `small` DynamicCache with as many tokens as keepkv has slots (it answers
nonsense, and is as fast as a cache of that size can be). Medians and quartiles of the steps, and of the ratios step by step;
the last line of standard output is one JSON object. --profile adds a table of the operations of one step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from filled import kv_bytes
from keepkv import KeepCache
from keepkv.attend.dispatch import backend_for
from keepkv.models import loading
from prose import prose
from timing import interleaved, machine, ratio, summary, write


def dense(cache_read: KeepCache, tokens: int) -> DynamicCache:
    """transformers' own cache with the first `tokens` tokens of one that was read and is not compressed."""
    cache = DynamicCache()
    for index, layer in enumerate(cache_read.layers):
        cache.update(layer.keys[:, :, :tokens], layer.values[:, :, :tokens], index)
    return cache


def stepper(model: PreTrainedModel, token: torch.Tensor, cache: Cache) -> Callable[[], float]:
    """Decodes one token; what it returns is the seconds it took."""

    def step() -> float:
        start = time.perf_counter()
        model(token, past_key_values=cache)
        return time.perf_counter() - start

    return step


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, help="a text file (default: documentation strings)")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--budgets", default="10%", help="separated by commas")
    parser.add_argument("--method", default="keepkv", help="what to compress with: snapkv is quicker, speeds hardly differ")
    parser.add_argument("--slot-dtype", default="", help="also with quantized slots: int8,int4")
    parser.add_argument("--steps", type=int, default=48, help="tokens decoded, after a sixth as many to warm up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", type=int, metavar="ROWS", help="a table of the dearest operations of one step")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer = loading.load(args.model)
    text = args.text.read_text() if args.text else prose()
    ids = tokenizer(text[: 12 * args.tokens], return_tensors="pt", verbose=False)["input_ids"][:, : args.tokens + 1]
    cache_read = KeepCache(model, auto=False)
    model(ids[:, :-1], past_key_values=cache_read, logits_to_keep=1)
    caches: dict[str, Cache] = {"full": dense(cache_read, args.tokens)}
    bases: dict[str, tuple[str, ...]] = {}
    for budget in args.budgets.split(","):
        compact = cache_read.fork().compress(budget, args.method, slot_dtype="float")
        heads = sum(layer.heads for layer in compact.keep_layers)
        slots = sum(len(layer.slots.keys) for layer in compact.keep_layers) // heads
        caches |= {f"small {budget}": dense(cache_read, slots), f"keepkv {budget}": compact}
        bases[f"keepkv {budget}"] = ("full", f"small {budget}")
        for slot_dtype in filter(None, args.slot_dtype.split(",")):
            caches[f"keepkv {budget} {slot_dtype}"] = cache_read.fork().compress(budget, args.method, slot_dtype=slot_dtype)
            bases[f"keepkv {budget} {slot_dtype}"] = ("full", f"keepkv {budget}")
    shape = cache_read.keep_layers[0].keys.shape
    del cache_read

    token = ids[:, -1:]
    bytes_of = {name: kv_bytes(cache) for name, cache in caches.items()}
    steps = interleaved(args.steps, {name: stepper(model, token, cache) for name, cache in caches.items()}, args.steps // 6 + 1)
    record = {
        "what": "seconds of one decoding step", "model": args.model, "dtype": str(model.dtype), "tokens": args.tokens,
        "method": args.method, "layers": len(caches["full"].layers), "kv_heads": shape[1], "head_size": shape[3],
        "query_heads": model.config.num_attention_heads,
        "backend": str(backend_for(token.device, model.dtype, shape[3])), "kv_bytes": bytes_of,
        "seconds": {name: summary(values) for name, values in steps.items()}, "ratios": {}, **machine(),
    }  # fmt: skip
    print(f"{args.model}, {args.tokens:,} tokens, {args.threads} threads, {args.steps} steps, load {record['load']:.1f}")
    for name, of in record["seconds"].items():
        quartiles = f"({1e3 * of['quartile_1']:.1f} to {1e3 * of['quartile_3']:.1f})"
        print(f"  {name:16s} {1e3 * of['median']:7.1f} ms a token {quartiles:16s} {bytes_of[name] / 1e6:8.1f} MB")
    for name, base_names in bases.items():
        for base in base_names:
            of = record["ratios"][f"{name} / {base}"] = ratio(steps[base], steps[name])
            quartiles = f"({of['quartile_1']:.2f} to {of['quartile_3']:.2f})"
            print(f"  {name} is {of['median']:.2f} times as fast as {base} {quartiles}")
    if args.profile:
        for name, cache in caches.items():
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                model(token, past_key_values=cache)
            print(
                f"\n{name}\n"
                + profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=args.profile, max_name_column_width=40)
            )
    write(record, args.json)


if __name__ == "__main__":
    main()
