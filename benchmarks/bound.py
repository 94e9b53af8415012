"""The paper's error bound on real queries: how often it exists, what it says, what is measured.

    python benchmarks/bound.py TEXT --tokens 1024 --queries 256 --stride 8 --budgets 10%,50% [-o bound.json]

Reads TEXT, merges the first tokens with predicted scores (moving average, the selection of keepkv-paper), and asks with the
true queries of the text that follows, every head its own, over the merged part alone. "step": all sets of a head at once;
"set": one at a time, the others exact. The change is ||o' - o|| against what stays, without the tokens that were dropped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from keepkv import KeepCache, methods
from keepkv.attend.states import exact
from keepkv.budget import Budget
from keepkv.compress import compress
from keepkv.merge import error_bound, similarity
from keepkv.merge.merged import Merged
from keepkv.methods import keepkv_paper
from keepkv.models import loading
from keepkv.text import file
from keepkv.types import Observation

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Merged]
PAPER = methods.get("keepkv-paper")


def as_printed(keys: Tensor, values: Tensor, kept: Tensor, log_score: Tensor) -> Merged:
    """ZIP without the guard of `keepkv_paper.zip_merge`; fallbacks: sets of |λ| > 3, for which nothing is proved."""
    scored = keepkv_paper.Scored(keys, values, kept, log_score, 0.8)
    scale, odd = scored.log_mean / scored.pi_level, scored.groups.size > 1
    return scored.result(scale[:, None] * scored.groups.mean(keys, scored.pi), int(((scale.abs() > 3) & odd).sum()))


RULES: dict[str, Rule] = {
    "zip": keepkv_paper.zip_merge, "zip as printed": as_printed, "convex-exact": keepkv_paper.convex_exact_merge,
}  # fmt: skip
SCORES: dict[str, Callable[[Observation], Tensor]] = {
    "average": keepkv_paper.moving_average,
    "last query": lambda observation: keepkv_paper.moving_average(observation, window=1),
}


def observe(model: Any, ids: Tensor, tokens: int) -> tuple[list[Observation], list[Tensor]]:
    """What every layer showed of the first tokens, and the queries [H, G, n, d], scaled, of those that follow."""
    cache = KeepCache(model, auto=False)
    model(ids[:, :tokens], past_key_values=cache, logits_to_keep=1)
    later = cache.fork()
    model(ids[:, tokens:], past_key_values=later, logits_to_keep=1)
    before, after = (list(each.observations()) for each in (cache, later))
    return before, [
        observation.queries[:, :, observation.query_positions >= tokens].double() * observation.scale for observation in after
    ]


def one_by_one(keys: Tensor, values: Tensor, merged: Merged, target: Tensor) -> Iterator[tuple[Merged, Tensor]]:
    """For every set of more than one token, the cache in which only that one is merged, and its targets."""
    for slot in (torch.bincount(target[target >= 0], minlength=len(merged.keys)) > 1).nonzero().flatten().tolist():
        rest = ((target >= 0) & (target != slot)).nonzero().flatten()
        place = torch.where(target == slot, 0, -1)
        place[rest] = torch.arange(1, len(rest) + 1)
        bias = torch.cat([merged.bias[[slot]], merged.bias.new_zeros(len(rest))])
        joined_keys = torch.cat([merged.keys[[slot]], keys[rest]])
        yield Merged(joined_keys, torch.cat([merged.values[[slot]], values[rest]]), bias), place


def cases(queries: Tensor, keys: Tensor, values: Tensor, merged: Merged, predicted: Tensor, target: Tensor) -> Tensor:
    """[6, R]: the three bounds, γ, the change, and the change when what was dropped counts too; as shares of ||o||."""
    stay = target >= 0
    shared = (torch.bincount(target[stay]) > 1)[target.clamp(min=0)] & stay
    gamma = error_bound.reach(values[shared], values[stay]).expand(len(queries))
    output, _ = exact(queries, keys[stay], values[stay], keys.new_zeros(int(stay.sum())), 1.0)
    full, _ = exact(queries, keys, values, keys.new_zeros(len(keys)), 1.0)
    merged_output, _ = exact(queries, merged.keys, merged.values, merged.bias, 1.0)
    limits = error_bound.bounds(queries, keys, values, merged, predicted, target)
    change = error_bound.change(queries, keys, values, merged, target)
    length: Tensor = vector_norm(output, dim=-1)
    return torch.stack([*limits, gamma, change, vector_norm(merged_output - full, dim=-1)]) / length


def row(parts: list[Tensor]) -> dict[str, float]:
    """The figures of one variant. useful: the stated bound is below γ, which holds for any two weighted means."""
    paper, corrected, reweighted, gamma, change, with_dropped = torch.cat(parts, 1)
    exists = paper.isfinite()

    def middle(x: Tensor) -> float:
        return float(x.median()) if len(x) else float("nan")

    def share(x: Tensor) -> float:
        return float(x.double().mean()) if len(x) else float("nan")

    def broken(limit: Tensor) -> int:
        return int((change > limit * (1 + 1e-9) + 1e-9).sum())

    return {
        "cases": len(change), "exists": share(exists), "useful": share(paper < gamma), "bound": middle(paper[exists]),
        "change_there": middle(change[exists]), "violations": broken(paper),
        "violations_with_dropped": share((with_dropped > paper)[exists]), "corrected_exists": share(corrected.isfinite()),
        "corrected_violations": broken(corrected), "gamma": middle(gamma), "reweighted": middle(reweighted),
        "reweighted_violations": broken(reweighted), "change": middle(change), "change_95": float(change.quantile(0.95)),
        "with_dropped": middle(with_dropped),
    }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a text file")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens that are compressed")
    parser.add_argument("--queries", type=int, default=256, help="tokens after them that ask")
    parser.add_argument("--stride", type=int, default=4, help="every n-th of those")
    parser.add_argument("--budgets", default="10%,50%")
    parser.add_argument("--layers", default="0,7,14,21,29")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("-o", "--output", type=Path, help="the figures as JSON")
    args = parser.parse_args()
    model, tokenizer = loading.load(args.model)
    ids = tokenizer(file.read_text(args.text), return_tensors="pt", verbose=False)["input_ids"]
    observations, queries = observe(model, ids[:, : args.tokens + args.queries].to(model.device), args.tokens)
    select = replace(PAPER, merge=methods.get("snapkv").merge)  # nothing is merged yet
    table = []
    for budget in args.budgets.split(","):
        heads = sum(observation.heads for observation in observations)
        plan = compress(observations, select, Budget.parse(budget).total_slots(args.tokens, heads, 1)).plan
        cases_of: dict[tuple[str, str, str], list[Tensor]] = defaultdict(list)
        dropped, sizes, fallbacks = [], [], dict.fromkeys(RULES, 0)
        for layer in map(int, args.layers.split(",")):
            observation = observations[layer]
            predicted = {name: log_score(observation).double() for name, log_score in SCORES.items()}
            for head, kept in enumerate(plan.kept[layer]):
                keys, values = observation.keys[head].double(), observation.values[head].double()
                ask = queries[layer][head, :, :: args.stride].flatten(0, 1)
                target = similarity.nearest_kept(keys, kept, 0.8)
                dropped.append((ask @ keys.T).softmax(-1)[:, target < 0].sum(-1))
                sizes.append(float((torch.bincount(target[target >= 0]) > 1).sum()))
                for (kind, scores), (name, rule) in product(predicted.items(), RULES.items()):
                    merged = rule(keys, values, kept, scores[head])
                    cases_of[name, kind, "step"].append(cases(ask, keys, values, merged, scores[head], target))
                    if kind == "average":
                        fallbacks[name] += merged.fallbacks
                        for single, place in one_by_one(keys, values, merged, target):
                            cases_of[name, kind, "set"].append(cases(ask, keys, values, single, scores[head], place))
        print(
            f"{budget}: {sum(sizes):.0f} sets in {len(sizes)} heads, {fallbacks['zip']} guarded, "
            f"{fallbacks['zip as printed']} of |λ| > 3; "
            f"dropped: median {float(torch.cat(dropped).median()):.3f} of the attention"
        )
        for (name, kind, scope), parts in cases_of.items():
            table.append({"budget": budget, "rule": name, "score": kind, "scope": scope, **row(parts)})
            print(f"  {name}, {kind}, {scope}: " + " ".join(f"{k} {v:.4g}" for k, v in list(table[-1].items())[4:]))
    if args.output:
        args.output.write_text(json.dumps({**vars(args), "output": None, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
