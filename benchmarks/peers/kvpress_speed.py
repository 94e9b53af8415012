"""Speed and bytes of kvpress's presses: reading, compressing, and decoding beside the full cache in the same process.

Runs in kvpress's environment (README.md). Reads --tokens of a text once with every press, then decodes one token with every
cache in turn. What AdaKV drops it keeps, and masks: a list of the module, which is put back before every step. `../decode.py`
and `../compress.py` say the same of keepkv; what compares are the ratios to the full cache.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import kvpress as kp
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PRESSES = {
    "snapkv": kp.SnapKVPress,
    "expected": kp.ExpectedAttentionPress,
    "adakv": lambda: kp.AdaKVPress(kp.ExpectedAttentionPress()),
    "kvzip": kp.KVzipPress,
}


def nbytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--budget", type=float, default=10, help="percent of slots kept")
    parser.add_argument("--presses", default="snapkv,expected,adakv")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(args.text.read_text()[: 12 * args.tokens], return_tensors="pt")["input_ids"][:, : args.tokens]
    caches, seconds, masked = {}, {}, {}
    for name in ["full", *args.presses.split(",")]:
        caches[name] = DynamicCache()
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None
        start = time.perf_counter()
        if name == "full":
            model(ids, past_key_values=caches[name], logits_to_keep=1)
        else:
            press = PRESSES[name]()
            if name == "adakv":
                press.press.compression_ratio = 1 - args.budget / 100
            else:
                press.compression_ratio = 1 - args.budget / 100
            with press(model):
                model(ids, past_key_values=caches[name], logits_to_keep=1)
        seconds[name] = time.perf_counter() - start
        print(f"{name}: read in {seconds[name]:.1f} s, {nbytes(caches[name]) / 1e6:.1f} MB", flush=True)
        masked[name] = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    steps = {name: [] for name in caches}
    for i in range(args.steps + 4):
        for name, cache in caches.items():
            for layer, indices in zip(model.model.layers, masked[name], strict=True):
                layer.self_attn.masked_key_indices = indices
            where = torch.tensor([[args.tokens + i]])
            start = time.perf_counter()
            model(ids[:, -1:], past_key_values=cache, position_ids=where)
            if i >= 4:
                steps[name].append(time.perf_counter() - start)
    rows = {}
    for name, times in steps.items():
        faster = statistics.median(f / t for f, t in zip(steps["full"], times, strict=True))
        rows[name] = {
            "reading_seconds": seconds[name], "reading_over_full": seconds[name] / seconds["full"],
            "step_seconds": statistics.median(times), "times_full": faster, "bytes": nbytes(caches[name]),
        }  # fmt: skip
        print(f"{name:10s} {1e3 * rows[name]['step_seconds']:7.1f} ms a token, {faster:.2f} times as fast as full", flush=True)
    record = {
        "tokens": args.tokens,
        "budget": args.budget,
        "threads": args.threads,
        "torch": torch.__version__,
        "presses": rows,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
