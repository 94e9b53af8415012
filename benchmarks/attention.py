"""One layer's attention over slots on this machine, backends in turn, beside PyTorch's over as many dense tokens.

    python benchmarks/attention.py --threads 1 [--json results/attention.json]

Ragged heads, a fifth to nine fifths of 819 slots; one new token (the G query heads of a group are the rows) and 512 of them.
`few` is what a decoding step takes: matrix products over slots and a tail of 32 tokens; the others attend the slots alone.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from filled import ragged, timed
from keepkv.attend import bias_in_keys, sdpa
from keepkv.attend.dispatch import attend_slots
from timing import interleaved, machine, summary, write

SHAPES = {  # KV heads, query heads of each, head size
    "SmolLM2-135M": (3, 3, 64), "Gemma-3-270M": (1, 4, 256), "Qwen3-0.6B": (8, 2, 128), "Llama-3.2-1B": (8, 4, 64),
}  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=819, help="slots of a head on average")
    parser.add_argument("--layers", type=int, default=12, help="different slots, so that nothing is in the cache")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu = torch.device("cpu")
    record: dict[str, Any] = {"what": "seconds of one layer", "slots": args.slots, "shapes": {}, **machine()}
    for name, (heads, group, size) in SHAPES.items():
        for new in (1, 512):
            rows, scale = group * new, size**-0.5
            query, tail_states = torch.randn(1, heads, rows, size), torch.randn(1, heads, 32, size)
            layers = [ragged(1, heads, args.slots, size, query) for _ in range(args.layers)]
            slots_with_bias = [bias_in_keys.widen(slots, scale) for slots in layers]
            dense = [torch.randn(2, 1, heads, args.slots, size) for _ in layers]
            dense_query = query.view(1, heads * group, new, size)
            variants = {
                "dense": [partial(scaled_dot_product_attention, dense_query, k, v, enable_gqa=True) for k, v in dense],
                "sdpa": [partial(attend_slots, query, slots, scale, "sdpa") for slots in layers],
                "bias_in_keys": [partial(attend_slots, query, slots, scale, "bias_in_keys") for slots in slots_with_bias],
                "eager": [partial(attend_slots, query, slots, scale, "eager") for slots in layers],
            }
            if rows <= sdpa.FEW:
                variants["few"] = [
                    partial(sdpa.attend_few, query, slots, tail_states, tail_states, None, scale) for slots in layers
                ]

            def run(calls: list[Any]) -> None:
                for call in calls:
                    call()

            times = interleaved(args.rounds, {key: timed(partial(run, calls), cpu) for key, calls in variants.items()}, 2)
            times_per_layer = {key: summary([value / args.layers for value in values]) for key, values in times.items()}
            record["shapes"][f"{name}, {new} new"] = times_per_layer
            cells = "  ".join(f"{key} {1e6 * of['median']:8.0f}" for key, of in times_per_layer.items())
            print(f"{name:14s} {new:4d} new   us a layer: {cells}", flush=True)
    write(record, args.json)


if __name__ == "__main__":
    main()
