"""Which tokens kvpress's presses keep on a real prompt: per press, layer and KV head, as JSON.

Runs in kvpress's environment (README.md) on what dump_segments.py wrote, first stretch of each text. Budgets are uniform, but
for kvcompose, which allots slots to layers. positions.py then compares keepkv's own rows of the same methods.

Compactor multiplies keys by a random matrix: "compactor" does so with the seeds 0 and 1, which shows how far chance alone goes,
and in "compactor-exact" the matrix is the identity. Its stretches lose some of their first tokens, so that its chunks of 256
tokens are full: kvpress lets the padding of a last chunk take part.
"""

import argparse
import json
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import kvpress as kp
import torch
from transformers import AutoModelForCausalLM, DynamicCache

PRESSES = {
    "knorm": kp.KnormPress,
    "keydiff": kp.KeyDiffPress,
    "snapkv": lambda: kp.SnapKVPress(window_size=32),
    "tova": kp.TOVAPress,
    "expected": kp.ExpectedAttentionPress,
    "streaming": kp.StreamingLLMPress,
    "kvcompose": kp.KVComposePress,
    "compactor": kp.CompactorPress,
    "compactor-exact": partial(kp.CompactorPress, sketch_dimension=64),
}
SEEDS = {"compactor": (0, 1)}


def kept_positions(model, ids: torch.Tensor, press: kp.BasePress, ratio: float, seed: int = 0) -> list[list[list[int]]]:
    """The press compresses as documented; kept keys are found again among the full cache's."""
    torch.manual_seed(seed)
    full, compressed = DynamicCache(), DynamicCache()
    model(ids, past_key_values=full)
    press.compression_ratio = ratio
    # Compactor draws its matrix [..., 64, 64] at this place, and divides it by 8.
    exact = mock.patch("torch.randn", lambda *shape, **kwargs: 8 * torch.eye(64).expand(shape))
    with exact if getattr(press, "sketch_dimension", 0) == 64 else nullcontext(), press(model):
        model(ids, past_key_values=compressed)
    layers = []
    for full_layer, layer in zip(full.layers, compressed.layers, strict=True):
        heads = []
        for keys, few in zip(full_layer.keys[0], layer.keys[0], strict=True):
            place = torch.cdist(few.double(), keys.double()).argmin(1)
            torch.testing.assert_close(keys[place], few, rtol=0, atol=1e-3)  # a press may read with another attention
            assert len(place.unique()) == len(place), "two kept keys are the same token"
            heads.append(sorted(place.tolist()))
        layers.append(heads)
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--segments", type=Path, required=True, help="what dump_segments.py wrote")
    parser.add_argument("--budgets", type=float, nargs="+", default=[50, 10], help="percent of slots kept")
    parser.add_argument("--presses", nargs="+", choices=PRESSES, help="only these")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa").eval()
    data, rows = json.loads(args.segments.read_text()), []
    for text, stretches in data["texts"].items():
        whole = torch.tensor(stretches[:1])[:, : -data["continuation"]]
        for name in args.presses or PRESSES:
            ids = whole[:, (whole.shape[1] - 12) % 256 :] if name.startswith("compactor") else whole
            for budget, seed in product(args.budgets, SEEDS.get(name, (0,))):
                places = kept_positions(model, ids, PRESSES[name](), 1 - budget / 100, seed)
                row = {"text": text, "method": name, "budget": budget, "seed": seed, "ids": ids[0].tolist(), "kept": places}
                rows.append(row)
                args.output.write_text(json.dumps(rows))
                print(f"{text}: {name} at {budget:g}%: {len(places[0][0])} of {ids.shape[1]} tokens a head", flush=True)


if __name__ == "__main__":
    main()
