"""Which tokens kvpress's presses keep on a real prompt: per press, layer and KV head, as JSON.

Runs in kvpress's environment (README.md) on what dump_segments.py wrote, first stretch of each text, uniform budgets.
positions.py then compares keepkv's own rows of the same methods.
"""

import argparse
import json
from pathlib import Path

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
}


def kept_positions(model, ids: torch.Tensor, press: kp.ScorerPress, ratio: float) -> list[list[list[int]]]:
    """The press compresses as documented; kept keys are found again among the full cache's."""
    full, compressed = DynamicCache(), DynamicCache()
    model(ids, past_key_values=full)
    press.compression_ratio = ratio
    with press(model):
        model(ids, past_key_values=compressed)
    layers = []
    for full_layer, layer in zip(full.layers, compressed.layers, strict=True):
        heads = []
        for keys, few in zip(full_layer.keys[0], layer.keys[0], strict=True):
            place = torch.cdist(few.double(), keys.double()).argmin(1)
            assert torch.equal(keys[place], few), "a kept key is not one of the prompt's"
            heads.append(sorted(place.tolist()))
        layers.append(heads)
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--segments", type=Path, required=True, help="what dump_segments.py wrote")
    parser.add_argument("--budgets", type=float, nargs="+", default=[50, 10], help="percent of slots kept")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa").eval()
    data, rows = json.loads(args.segments.read_text()), []
    for text, stretches in data["texts"].items():
        ids = torch.tensor(stretches[:1])[:, : -data["continuation"]]
        for name, make in PRESSES.items():
            for budget in args.budgets:
                places = kept_positions(model, ids, make(), 1 - budget / 100)
                rows.append({"text": text, "method": name, "budget": budget, "ids": ids[0].tolist(), "kept": places})
                print(f"{text}: {name} at {budget:g}%: {len(places[0][0])} of {ids.shape[1]} tokens a head", flush=True)
    args.output.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
