"""Joined documents: quality, time to first token and bytes, against reading them together. Passage QA with distractors.

    python benchmarks/chunks.py xquad.json --samples 40 --documents 6 --json benchmarks/results/compiled/chunks.json

Every document is consecutive paragraphs of one article, compiled alone. A sample is one question, the document that answers it,
and others, in random order. Against the full prefill of the same prompt: KL of the next-token distributions over the right
answer's tokens, and how much less likely the answer became (nats per token), with bootstrap intervals over samples. Time to the
first token starts with the compiled documents in memory. Variants are interleaved, sample by sample, and `prefix` is the first
document's cache and a prefill of the others (what an engine's prefix cache saves): its answers are those of the full prefill.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import timing
from keepkv import KeepCache
from keepkv.documents.document import Document, Recipe, compile_text
from keepkv.documents.joining import cachecraft
from keepkv.documents.joining.cacheblend import ReusedText
from keepkv.documents.joining.joined import joined
from keepkv.models import loading
from keepkv.text.prompt import question_ids
from keepkv.text.reading import REPEAT


def passages(data: dict[str, Any], words: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """Documents of about so many words, each with its questions and their answers."""
    documents = []
    for article in data["data"]:
        text, questions = "", []
        for paragraph in article["paragraphs"]:
            text += paragraph["context"].strip() + "\n"
            questions += [(qa["question"], qa["answers"][0]["text"]) for qa in paragraph["qas"]]
            if len(text.split()) >= words:
                documents.append((text, questions))
                text, questions = "", []
    return documents


@torch.inference_mode()
def chances(model: Any, cache: KeepCache, question: Tensor, answer: Tensor) -> tuple[Tensor, float]:
    """Log-probabilities [n, V] over the answer's tokens, fed after the question; seconds to the first of them."""
    start = time.perf_counter()
    first = model(question, past_key_values=cache, logits_to_keep=1).logits
    seconds = time.perf_counter() - start
    later_logits = model(answer[:, :-1], past_key_values=cache).logits if answer.shape[1] > 1 else first[:, :0]
    return torch.cat([first, later_logits], 1)[0].float().log_softmax(-1), seconds


def interval(values: list[float], rng: random.Random) -> list[float]:
    """Mean, and the bounds of its 95% bootstrap interval."""
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(2000))
    return [statistics.fmean(values), means[50], means[1949]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a file in SQuAD's format")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--words", type=int, default=260)
    parser.add_argument("--pool", type=int, default=40, help="documents to draw from")
    parser.add_argument("--budgets", nargs="+", default=["10%", "25%"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = loading.load(args.model)
    rng = random.Random(args.seed)
    documents = passages(json.loads(args.data.read_text()), args.words)[: args.pool]
    exact, compact = [], {budget: [] for budget in args.budgets}
    for text, _ in track(documents, description="compiling"):
        exact.append(compile_text(model, tokenizer, text, Recipe("100%", "full")))
        for budget, compiled in compact.items():
            compiled.append(
                _with_exact(
                    compile_text(model, tokenizer, text, Recipe(budget, slot_dtype="float")), exact[-1].cache.keep_layers
                )
            )
    records: list[dict[str, Any]] = []
    for number in track(range(args.samples), description="asking"):
        sample = rng.sample(range(len(documents)), args.documents)
        question, answer = rng.choice(documents[sample[0]][1])
        rng.shuffle(sample)
        compact_sample = {name: [compiled[i] for i in sample] for name, compiled in compact.items()}
        records += measure(model, tokenizer, [exact[i] for i in sample], compact_sample, question, answer, number)
        if args.json:
            args.json.write_text(json.dumps(summed(records, args), indent=1) + "\n")
    print("| variant | KL | answer's loss | top-1 | first token, s | cache, MB | read again |\n|---|---|---|---|---|---|---|")
    for name, means in summed(records, args)["rows"].items():
        cells = [f"{means[key][0]:.3f} [{means[key][1]:.3f}, {means[key][2]:.3f}]" for key in ("kl", "loss", "top1")]
        costs = f"{means['first_token_seconds']:.2f} | {means['kv_bytes'] / 1e6:.1f} | {100 * means['read_again']:.0f}%"
        print(f"| {name} | {' | '.join(cells)} | {costs} |")


def summed(records: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Every variant's means with intervals, and the records."""
    rows, rng = {}, random.Random(args.seed)
    for name in dict.fromkeys(record["variant"] for record in records):
        variant_records = [record for record in records if record["variant"] == name]
        rows[name] = {
            "kl": interval([record["kl"] for record in variant_records], rng),
            "loss": interval([record["loss"] for record in variant_records], rng),
            "top1": interval([record["top1"] for record in variant_records], rng),
            "first_token_seconds": statistics.median(record["seconds"] for record in variant_records),
            "kv_bytes": statistics.fmean(record["kv_bytes"] for record in variant_records),
            "read_again": statistics.fmean(record["read_again"] for record in variant_records),
        }
    return {
        "samples": len({record["sample"] for record in records}), "documents": args.documents, "model": args.model,
        "tokens": statistics.fmean(record["tokens"] for record in records), "budgets": args.budgets,
        "machine": timing.machine(),
        "rows": rows, "records": records,
    }  # fmt: skip


def measure(
    model: Any, tokenizer: Any, exact: list[Document], compact: dict[str, list[Document]], question: str, answer: str,
    number: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """One record per variant for one prompt."""
    asks = exact[0].question(tokenizer, question)
    target = tokenizer(" " + answer if not tokenizer.chat_template else answer, add_special_tokens=False, return_tensors="pt")
    right = target["input_ids"]
    ids = joined(model, exact).ids
    first = exact[0].cache
    later = ids[:, exact[0].tokens :]
    keys = [str(i) for i in range(len(exact))]
    variants = {}

    def full() -> KeepCache:
        cache = KeepCache(model, 1.0, "full")
        model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def prefix() -> KeepCache:
        cache = first.fork()
        model(later, past_key_values=cache, logits_to_keep=1)
        return cache

    crafts = stood(model, exact, keys, random.Random(number))
    ways: dict[str, tuple[Callable[[], KeepCache], float]] = {"full prefill": (full, 1.0), "prefix cache": (prefix, 1.0)}
    ways["joined"] = lambda: joined(model, exact).cache, 0.0
    for share in (0.05, 0.15, 0.3):
        ways[f"CacheBlend {share:.0%}"] = lambda share=share: joined(model, exact, share).cache, share
    ways["CacheBlend, paper, 15%"] = lambda: joined(model, exact, 0.15, variant="paper").cache, 0.225
    recomputed_shares = [
        len(cachecraft.best(crafts[i], keys[: i + 1]).chosen(keys[: i + 1])) / exact[i + 1].tokens
        for i in range(len(exact) - 1)
    ]
    ways["Cache-Craft"] = lambda: joined(model, exact, 1.0, crafts=crafts, keys=keys).cache, statistics.fmean(recomputed_shares)
    for budget, documents in compact.items():
        ways[f"keepkv {budget}, joined"] = lambda documents=documents: joined(model, documents).cache, 0.0
        ways[f"keepkv {budget}, joined, 15% repaired"] = lambda documents=documents: joined(model, documents, 0.15).cache, 0.15
    order = [*ways]
    random.Random(number).shuffle(order)
    for way in order:
        build, again = ways[way]
        start = time.perf_counter()
        cache = build()
        built = time.perf_counter() - start
        kv_bytes = cache.report().kv_bytes
        log_probs, seconds = chances(model, cache, asks, right)
        variants[way] = log_probs, built + seconds, kv_bytes, again
    budget, name = next(iter(compact)), f"keepkv {next(iter(compact))}"
    once = KeepCache(model, budget, slot_dtype="float", auto=False)  # the same prompt read together and then compressed
    start = time.perf_counter()
    model(ids, past_key_values=once, logits_to_keep=1)
    once.repeat(model, ids, question_ids(tokenizer, REPEAT, exact[0].before, exact[0].after)).compress()
    built = time.perf_counter() - start
    log_probs, seconds = chances(model, once, asks, right)
    variants[f"{name}, read together"] = log_probs, built + seconds, once.report().kv_bytes, 1.0
    theirs = variants["full prefill"][0]
    picked = right[0][:, None]
    return [
        {
            "variant": way, "sample": number, "tokens": ids.shape[1], "seconds": seconds, "kv_bytes": kv_bytes,
            "read_again": again,
            "kl": float((theirs.exp() * (theirs - log_probs)).sum(-1).mean()),
            "loss": float((theirs.gather(1, picked) - log_probs.gather(1, picked)).mean()),
            "top1": float((theirs.argmax(-1) == log_probs.argmax(-1)).float().mean()),
        }
        for way in [*ways, f"{name}, read together"]
        for log_probs, seconds, kv_bytes, again in [variants[way]]
    ]  # fmt: skip


def stood(model: Any, exact: list[Document], keys: list[str], rng: random.Random) -> list[list[cachecraft.ChunkVariant]]:
    """One variant of every later document: as it stood behind two others of this prompt, in some other order."""
    variants = []
    for place in range(1, len(exact)):
        predecessors = rng.sample([i for i in range(len(exact)) if i != place], 2)
        before = joined(model, [exact[i] for i in predecessors])
        ends = [exact[predecessors[0]].tokens, before.tokens]
        document = exact[place]
        ids = document.ids[:, document.lead :]
        text = ReusedText(ids, lambda i, d=document: tuple(x[:, :, d.lead :] for x in _layer(d, i)))  # type: ignore[arg-type, misc]
        variants.append([cachecraft.observe(model, before.cache, ends, [keys[i] for i in predecessors], text)])
    return variants


def _layer(document: Document, index: int) -> tuple[Tensor, Tensor]:
    layer = document.cache.keep_layers[index]
    return layer.keys, layer.values


def _with_exact(document: Document, layers: list[Any]) -> Document:
    from dataclasses import replace

    return replace(document, exact=lambda index: (layers[index].keys, layers[index].values))


if __name__ == "__main__":
    main()
