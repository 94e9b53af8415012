"""Whether keepkv's rows of the table keep the tokens that kvpress's presses of the same name keep. In keepkv's environment.

    python benchmarks/peers/positions.py --model MODEL_FOLDER --kept kept.json -o positions.json

kept.json is what kvpress_kept.py wrote. Both sides run at uniform budgets of whole tokens per head and with kvpress's
protection (which sinks and newest tokens always stay); then keepkv's own default row is compared as well. Prints, per text,
method and budget, the share of kept tokens that agree, the share of heads in which all do, and, where some do not, how
close to the border they were: the gap between the scores of the swapped tokens, over the score's spread.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from keepkv import METHODS, KeepCache, Method, allot
from keepkv.budget import Budget
from keepkv.models import loading

SINKS = {"expected": 4, "streaming": 4}
RECENT = {"tova": 1, "snapkv": 32}


def kept_positions(method: Method, cache: KeepCache, count: int) -> tuple[list[list[list[int]]], list[torch.Tensor]]:
    """Kept positions per layer and head, and the scores."""
    twin = cache.fork()
    scores = [method.score(observation) for observation in twin.observations()]
    twin.compress(Budget("count", count, str(count)), method)
    positions = []
    for layer in twin.keep_layers:
        bounds = layer.slots.offsets
        positions.append([layer.slots.positions[lo:hi].tolist() for lo, hi in pairwise(bounds)])
    return positions, scores


def gap(score: torch.Tensor, dropped: set[int], kept: set[int]) -> float:
    """How far apart the scores of swapped tokens are, in standard deviations of the head's finite scores."""
    finite = score[score.isfinite()]
    return float((score[sorted(kept)].min() - score[sorted(dropped)].max()).abs() / finite.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kept", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    model, _ = loading.load(args.model)
    table, caches = [], {}
    for row in json.loads(args.kept.read_text()):
        name, theirs = row["method"], row["kept"]
        if row["text"] not in caches:
            cache = KeepCache(model, auto=False, column_mass=True)
            with torch.inference_mode():
                model(torch.tensor([row["ids"]]), past_key_values=cache, logits_to_keep=1)
            caches[row["text"]] = cache
        count = len(theirs[0][0])
        alike = replace(METHODS[name], sinks=SINKS.get(name, 0), recent=RECENT.get(name, 0), allot=allot.uniform)
        for kind, method in (("alike", alike), ("default", METHODS[name])):
            got, scores = kept_positions(method, caches[row["text"]], count)
            pairs = [
                (set(a), set(b), scores[layer][head])
                for layer, (mine, yours) in enumerate(zip(got, theirs, strict=True))
                for head, (a, b) in enumerate(zip(mine, yours, strict=True))
            ]
            gaps = [gap(score, b - a, a - b) for a, b, score in pairs if a != b and len(a) == len(b)]
            table.append(
                {
                    "text": row["text"], "method": name, "budget": row["budget"], "protection": kind,
                    "tokens": sum(len(a & b) for a, b, _ in pairs) / sum(len(b) for _, b, _ in pairs),
                    "heads": sum(a == b for a, b, _ in pairs) / len(pairs), "largest_gap": max(gaps, default=0.0),
                }
            )  # fmt: skip
            print("{text:14} {method:10} {budget:>4g}% {protection:8} tokens {tokens:.4f} heads {heads:.3f} "
                  "largest gap {largest_gap:.2g}".format(**table[-1]), flush=True)  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
