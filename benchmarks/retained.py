"""Share of the right answers that survive compression, asked only after it: tasks x methods x budgets, paired.

    python benchmarks/retained.py TEXT --squad xquad.json --budgets 10%,5%,2% --methods keepkv,snapkv --samples 8 -o run.jsonl

TEXT is prose to hide things in. Only what the full cache answers counts: retained = sum of min(score, full's score) / sum of
full's scores, with a bootstrap interval over samples; loss: how much less likely the right answer became, in nats per token.
--by choice (default): right if the right answer is likelier, per token, than each of three wrong ones, so that small models
can do the tasks; --by answer: the model writes, and what it wrote is scored.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import tasks
from keepkv import KeepCache, loading
from keepkv.ask import greedy
from keepkv.methods import get
from keepkv.reading import REPEAT, Prompt, read, read_in_chunks


@torch.inference_mode()
def answers(
    model: Any,
    tokenizer: Any,
    sample: tasks.Sample,
    methods: list[str],
    budgets: list[str],
    reference: str,
    by: str,
    chunk: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """One record per question and variant; every variant starts from the same reading, those in chunks from their own."""
    prompt = Prompt(tokenizer, sample.text)
    ids = prompt.text
    once = read(model, ids, [get(name) for name in methods], prompt.question(REPEAT), reference=reference)
    variants = [("full", "100%"), *((method, budget) for budget in budgets for method in methods)]
    if chunk:
        variants += [(f"{method}/{chunk}", budget) for budget in budgets for method in methods]
    records = []
    for method, budget in variants:
        name, _, pieces = method.partition("/")
        if pieces:
            lead = prompt.question(REPEAT)
            cache = read_in_chunks(model, ids, get(name), budget, int(pieces), lead, reference=reference).cache
        else:
            cache = once.of(get(name)).compress(budget, name)
        report = cache.report()
        for number, question in enumerate(sample.questions):
            asked = prompt.question(question.ask)
            chances = [_loglik(model, tokenizer, cache, asked, text) for text in (question.expected, *question.wrong)]
            if by == "choice":
                text, score = "", float(chances[0] > max(chances[1:]))
            else:
                text = greedy(model, tokenizer, cache.fork(), ids, asked, question.ask, 64).answer
                score = question.score(text)
            records.append(
                {
                    "method": method, "budget": budget, "question": number, "score": score,
                    "loglik": chances[0], "answer": text, "expected": question.expected,
                    "tokens": ids.shape[1], "kv_bytes": report.kv_bytes, "prefill": once.seconds,
                    "rehearsal": once.repeat_cost(get(name)),
                    "compress": report.compress_seconds, "error": report.error, "fallbacks": report.fallbacks,
                }
            )  # fmt: skip
    return records


def _loglik(model: Any, tokenizer: Any, cache: KeepCache, asked: Tensor, text: str) -> float:
    """Mean log-probability per token of an answer after the question."""
    answer = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    fed = torch.cat([asked, answer], 1)
    logits = model(fed, past_key_values=cache.fork(), logits_to_keep=answer.shape[1] + 1).logits[0, :-1]
    return float(logits.float().log_softmax(-1).gather(1, answer[0, :, None]).mean())


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    full = {(r["task"], r["sample"], r["question"]): r for r in records if r["method"] == "full"}
    rows: dict[tuple[str, str, str], dict[int, list[tuple[float, float, float]]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        truth = full[r["task"], r["sample"], r["question"]]
        if r["method"] != "full" and truth["score"] > 0:
            row = (min(r["score"], truth["score"]), truth["score"], truth["loglik"] - r["loglik"])
            rows[r["task"], r["budget"], r["method"]][r["sample"]].append(row)
    table = []
    for (task, budget, method), samples in rows.items():
        groups = list(samples.values())
        rng, shares = random.Random(0), []
        for _ in range(1000):
            drawn = [row for group in rng.choices(groups, k=len(groups)) for row in group]
            shares.append(sum(row[0] for row in drawn) / sum(row[1] for row in drawn))
        shares.sort()
        flat = [row for group in groups for row in group]
        table.append(
            {
                "task": task, "budget": budget, "method": method, "questions": len(flat),
                "retained": sum(row[0] for row in flat) / sum(row[1] for row in flat),
                "low": shares[25], "high": shares[974], "loss": statistics.fmean(row[2] for row in flat),
            }
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="prose to hide things in")
    parser.add_argument("--squad", type=Path, help="questions in SQuAD format: adds the task passages")
    parser.add_argument("--tasks", default=",".join(tasks.TASKS))
    parser.add_argument("--methods", default="keepkv")
    parser.add_argument("--budgets", default="10%,5%,2%")
    parser.add_argument("--reference", choices=["context", "recall"], default="recall")
    parser.add_argument("--chunk", type=int, default=0, help="also read so many tokens at a time, for comparison")
    parser.add_argument("--by", choices=["choice", "answer"], default="choice")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--words", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("-o", "--output", type=Path, help="records, one JSON line each; an interrupted run continues")
    args = parser.parse_args()
    model, tokenizer = loading.load(args.model)
    haystack = tasks.sentences(loading.read_text(args.text))
    names = args.tasks.split(",") + (["passages"] if args.squad else [])
    paragraphs = list(tasks.articles(args.squad)) if args.squad else []
    records: list[dict[str, Any]] = []
    if args.output and args.output.exists():
        records = [json.loads(line) for line in args.output.read_text().splitlines()]
    done = {(r["task"], r["sample"]) for r in records}
    for name, number in track([(name, i) for i in range(args.samples) for name in names], console=Console(stderr=True)):
        if (name, number) in done:
            continue
        rng = random.Random(f"{args.seed} {name} {number}")
        sample = (
            tasks.passages(rng, paragraphs, args.words) if name == "passages" else tasks.TASKS[name](rng, haystack, args.words)
        )
        got = answers(
            model, tokenizer, sample, args.methods.split(","), args.budgets.split(","), args.reference, args.by, args.chunk
        )
        fresh = [{"task": name, "sample": number, **record} for record in got]
        records += fresh
        if args.output:
            with args.output.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in fresh)
    for row in summary(records):
        line = "{task:13} {budget:>4} {method:14} n={questions:<3} retained {retained:.3f} [{low:.3f}, {high:.3f}]"
        line += " loss {loss:+.3f}"
        print(line.format(**row))


if __name__ == "__main__":
    sys.exit(main())
