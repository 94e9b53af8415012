"""Does the process really become smaller? Resident memory before and after compression, beside the cache's own report.

python benchmarks/memory.py --tokens 6000
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from pathlib import Path

import torch

from keepkv import KeepCache
from keepkv.models import loading
from prose import prose


def resident() -> int:
    """Bytes of this process in memory, after what can be given back has been (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--budget", default="10%")
    args = parser.parse_args()
    model, tokenizer = loading.load(args.model)
    ids = tokenizer(prose(), return_tensors="pt", verbose=False)["input_ids"][:, : args.tokens].to(model.device)

    warm = KeepCache(model, args.budget)  # touches weights and code once
    model(ids[:, :512], past_key_values=warm, logits_to_keep=1)
    del warm
    empty = resident()
    full_cache = KeepCache(model, "100%")
    model(ids, past_key_values=full_cache, logits_to_keep=1)
    full, full_reported = resident() - empty, full_cache.report().kv_bytes
    del full_cache
    cache = KeepCache(model, args.budget)
    model(ids, past_key_values=cache, logits_to_keep=1)
    compressed, reported = resident() - empty, cache.report().kv_bytes
    print(f"{args.tokens} tokens, budget {args.budget}: above the model alone, in MB")
    print(f"  full cache   resident {full / 1e6:7.1f}   reported {full_reported / 1e6:7.1f}")
    print(f"  compressed   resident {compressed / 1e6:7.1f}   reported {reported / 1e6:7.1f}")
    record = {"tokens": args.tokens, "budget": args.budget, "resident_full": full, "reported_full": full_reported}
    print(json.dumps({**record, "resident": compressed, "reported": reported}))


if __name__ == "__main__":
    main()
