"""Whether keepkv's rows of the table keep the tokens that kvpress's presses of the same name keep. In keepkv's environment.

    python benchmarks/peers/positions.py --model MODEL_FOLDER --kept kept.json -o positions.json

kept.json is what kvpress_kept.py wrote. Both sides run with the same number of slots, the same for every head (but kvcompose,
whose layers differ), and with kvpress's protection (which sinks and newest tokens always stay): "alike". Then keepkv's own row
is compared as it is: "default". Where kvpress has drawn a random matrix with two seeds, these are compared with each other:
"seeds". Prints, per text, method and budget, the share of kept tokens that agree, the share of heads in which all do, and,
where some do not, how close to the border they were: the gap between the scores of the swapped tokens, over the score's spread.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from keepkv import METHODS, KeepCache, Method, allot, compress
from keepkv.methods import compactor, kvcompose
from keepkv.models import loading

SINKS = {"expected": 4, "streaming": 4, "compactor": 8}
RECENT = {"tova": 1, "snapkv": 32, "compactor": 4}

Kept = list[list[list[int]]]


def like_kvpress(name: str, budget: float) -> Method:
    """The row as the press is."""
    base = METHODS[name.removesuffix("-exact")]
    alike = replace(base, sinks=SINKS.get(base.name, 0), recent=RECENT.get(base.name, 0), allot=allot.uniform)
    if name == "kvcompose":
        return replace(alike, allot=partial(kvcompose.composite, first_largest=True))
    if name.startswith("compactor"):
        sketch = 64 if name.endswith("exact") else 48
        return replace(alike, score=partial(compactor.blended, sketch=sketch, blend=1 - budget / 100))
    return alike


def kept_positions(method: Method, cache: KeepCache, total: int) -> tuple[Kept, list[torch.Tensor]]:
    """Kept positions per layer and head, and the scores."""
    observations = cache.observations()
    slots = total / sum(observation.heads for observation in observations)
    scores = [method.score(replace(observation, slots=slots)) for observation in observations]
    kept = compress.compress(observations, method, total).plan.kept
    return [[head.tolist() for head in layer] for layer in kept], scores


def gap(score: torch.Tensor, dropped: set[int], kept: set[int]) -> float:
    """How far apart the scores of swapped tokens are, in standard deviations of the head's finite scores."""
    finite = score[score.isfinite()]
    return float((score[sorted(kept)].min() - score[sorted(dropped)].max()).abs() / finite.std())


def agreement(
    row: dict[str, object], kind: str, ours: Kept, theirs: Kept, scores: list[torch.Tensor] | None
) -> dict[str, object]:
    """One line of the table."""
    pairs = [
        (set(a), set(b), layer, head)
        for layer, (mine, yours) in enumerate(zip(ours, theirs, strict=True))
        for head, (a, b) in enumerate(zip(mine, yours, strict=True))
    ]
    gaps = (
        [gap(scores[layer][head], b - a, a - b) for a, b, layer, head in pairs if a != b and len(a) == len(b)] if scores else []
    )
    line = {
        "text": row["text"], "method": row["method"], "budget": row["budget"], "protection": kind,
        "tokens": sum(len(a & b) for a, b, _, _ in pairs) / sum(len(b) for _, b, _, _ in pairs),
        "heads": sum(a == b for a, b, _, _ in pairs) / len(pairs), "largest_gap": max(gaps, default=0.0),
    }  # fmt: skip
    print("{text:14} {method:15} {budget:>4g}% {protection:8} tokens {tokens:.4f} heads {heads:.3f} "
          "largest gap {largest_gap:.2g}".format(**line), flush=True)  # fmt: skip
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kept", type=Path, nargs="+", required=True)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    model, _ = loading.load(args.model)
    table, caches, first_seed = [], {}, {}
    for row in (row for file in args.kept for row in json.loads(file.read_text())):
        name, theirs = row["method"], row["kept"]
        key = (row["text"], name, row["budget"])
        if row.get("seed"):
            table.append(agreement(row, "seeds", first_seed[key], theirs, None))
            continue
        first_seed[key] = theirs
        method = like_kvpress(name, row["budget"])
        read = (len(row["ids"]), row["text"], method.repeat)
        if read not in caches:
            cache = KeepCache(model, auto=False, column_mass=True)
            ids = torch.tensor([row["ids"]])
            with torch.inference_mode():
                model(ids, past_key_values=cache, logits_to_keep=1)
                if method.repeat:
                    cache.repeat(model, ids, how=method.repeat)
            caches[read] = cache
        total = sum(len(head) for layer in theirs for head in layer)
        for kind, ours in (("alike", method), ("default", METHODS.get(name))):
            if ours is None:  # no row of ours is like that
                continue
            kept, scores = kept_positions(ours, caches[read], total)
            table.append(agreement(row, kind, kept, theirs, scores))
    if args.output:
        args.output.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
