r"""What looking back brings: of the answers that the full cache gives rightly, how many stay right, variant by variant.

    python benchmarks/lookback.py results/lookback.jsonl --model qwen2.5-coder-0.5b --tasks needle,needle-uuids \
        --data xquad.en.json --samples 3 --haystack moby-dick
    python benchmarks/lookback.py results/lookback.jsonl    (the table of a record)

A text is read and repeated once, compressed to every budget, and asked every question that the full cache answers rightly in
writing, in every variant:

    alone     the compact cache
    back      looking back as `lookback="auto"` does: index and words, the tokens read again
    exact     the same spans, their exact keys and values
    index     the spans that the index finds; words: those that the words find
    gold      the span in which the expected answer first stands (not on texts where it stands nowhere word for word)
    random    as many spans as `back` has, by chance; stale: those of the question before
    bm25      the passages that BM25 finds in as many tokens as the budget and the allowance have together, no cache

One line of JSON an answer is added to the file as soon as it is there; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from keepkv import KeepCache, Recipe, methods
from keepkv.eval.config import Config
from keepkv.eval.measure import Setup
from keepkv.eval.plan import tasks_by_name
from keepkv.eval.provenance import commit, versions
from keepkv.eval.rivals.bm25 import best_passages, split_into_passages
from keepkv.eval.run import sampled
from keepkv.eval.sample import Question
from keepkv.lookback.bring_back import brought_back, exact, tokens
from keepkv.lookback.look_back import FLAT, Looking
from keepkv.lookback.rank import looks
from keepkv.lookback.spans import Span, allowed, in_turn, tiles
from keepkv.models import loading
from keepkv.text.ask import greedy
from keepkv.text.prompt import Prompt
from keepkv.text.reading import REPEAT, Reading, read

VARIANTS = ("alone", "back", "exact", "index", "words", "gold", "random", "stale", "bm25")


class Text:
    """One text, read once."""

    def __init__(self, setup: Setup, text: str, recipe: Recipe) -> None:
        self.setup, self.text, self.recipe = setup, text, recipe
        self.prompt = Prompt(setup.tokenizer, text)
        self.ids = self.prompt.text.to(setup.model.device)
        self.method = methods.get(recipe.method)
        self.reading: Reading = read(setup.model, self.ids, [self.method], recipe, self.prompt.question(REPEAT))
        empty = self.prompt.question("")
        self.looking = Looking.of(setup.model, setup.tokenizer, self.ids, recipe, self.prompt.lead, empty)
        self.previous: list[Span] = []  # what came back for the question before

    def answer(self, cache: KeepCache, question: Question, prompt: Prompt | None = None) -> str:
        prompt = prompt or self.prompt
        later = prompt.question(question.ask)
        limit = self.setup.config.max_new_tokens
        return greedy(self.setup.model, self.setup.tokenizer, cache, prompt.text, later, question.ask, limit).answer

    def spans(self, cache: KeepCache, question: Question, rng: random.Random) -> dict[str, list[Span]]:
        """What each variant brings back."""
        looking, size = self.looking, self.ids.shape[1]
        later = self.prompt.question(question.ask)
        by_index = looks(self.setup.model, cache, later, looking.lead, looking.own_words(later))
        words = looking.words
        numbers = {"index": by_index.spans, "words": words.ranked(question.ask, 0)}
        numbers["back"] = in_turn(by_index.spans[: by_index.near], words.ranked(question.ask))
        if by_index.peak <= FLAT:
            numbers["back"] = []
        numbers["random"] = rng.sample(range(len(tiles(size))), len(tiles(size)))
        place = self.text.find(question.expected)
        if place >= 0:
            before = self.setup.tokens(self.text.strip()[:place]).shape[1]
            numbers["gold"] = [(looking.lead + before) // (tiles(size)[0][1])]
        spans = {name: allowed(ranked, size, looking.allowance) for name, ranked in numbers.items()}
        spans["exact"], spans["stale"], self.previous = spans["back"], self.previous, spans["back"]
        return spans

    def passages(self, question: Question, budget: int) -> str:
        """What the model answers from the passages alone."""
        count = lambda text: self.setup.tokens(text).shape[1]  # noqa: E731
        passages = best_passages(split_into_passages(self.text, count, budget), question.ask, count, budget)
        prompt = Prompt(self.setup.tokenizer, " ".join(passages))
        cache = KeepCache(self.setup.model, "100%", "full")
        self.setup.model(prompt.text, past_key_values=cache, logits_to_keep=1)
        return self.answer(cache, question, prompt)


def measured(text: Text, question: Question, cache: KeepCache, budget: str, wanted: list[str]) -> Iterator[dict[str, Any]]:
    """The wanted variants of one question."""
    spans = text.spans(cache, question, random.Random(question.ask))
    for variant in wanted:
        start = time.perf_counter()
        if variant == "bm25":
            answer, back = (
                text.passages(question, int(text.ids.shape[1] * float(budget[:-1]) / 100) + text.looking.allowance),
                [],
            )
        elif variant != "alone" and variant not in spans:
            continue
        else:
            back = spans.get(variant, [])
            source = exact(text.reading.cache) if variant == "exact" else tokens(text.setup.model, text.ids)
            answer = text.answer(brought_back(cache, back, source), question)
        seconds = round(time.perf_counter() - start, 3)
        yield {"variant": variant, "spans": back, "answer": answer, "score": question.score(answer), "seconds": seconds}


def run(args: argparse.Namespace) -> None:
    config = Config(haystack=args.haystack, max_new_tokens=64)
    setup = Setup(*loading.load(args.model), config)
    tasks = tasks_by_name(tuple(filter(None, args.tasks.split(","))), tuple(args.data))
    recipe = Recipe(slot_dtype=args.slot_dtype, lookback="auto")
    facts = {"model": args.model, "slot_dtype": args.slot_dtype, "commit": commit(), "versions": versions()}
    known = {key(row) for row in rows(args.record)}
    end = time.monotonic() + 60 * args.minutes
    for number in range(args.first, args.first + args.samples):
        for name, task in tasks.items():
            if time.monotonic() > end:
                return
            sample = sampled(setup, task, args.length, number)
            where = {"task": Path(name).stem if name.endswith(".json") else name, "sample": number}
            if (args.model, args.slot_dtype, where["task"], number) in {one[:4] for one in known}:
                continue
            text = Text(setup, sample.text, recipe)
            full = text.reading.cache.fork().compress("100%", "full")
            answers = [(question, text.answer(full.fork(), question)) for question in sample.questions]
            right = [question for question, answer in answers if question.score(answer) == 1]
            with args.record.open("a") as file:
                blank = {**facts, **where, "tokens": text.ids.shape[1], "questions": len(answers), "right": len(right)}
                file.write(json.dumps({**blank, "budget": "100%", "variant": "full"}) + "\n")
                for budget in args.budgets.split(","):
                    cache = text.reading.of(text.method).compress(budget, text.method, slot_dtype=args.slot_dtype)
                    report = cache.report()
                    held = {"budget": budget, "kv_bytes": report.kv_bytes, "kv_bytes_full": report.kv_bytes_full}
                    held["index_bytes"] = report.index_bytes
                    for index, question in enumerate(right):
                        asked = {"question": index, "ask": question.ask, "expected": question.expected}
                        for line in measured(text, question, cache, budget, args.variants.split(",")):
                            file.write(json.dumps({**blank, **held, **asked, **line}, ensure_ascii=False) + "\n")
                            file.flush()


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["slot_dtype"], row["task"], row["sample"], row["budget"], row["variant"]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(file: Path) -> None:
    """Markdown: of the answers that the full cache gives rightly, how many stay right."""
    cells: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows(file):
        if row["variant"] != "full":
            cells[row["model"], row["task"], row["budget"]][row["variant"]].append(row["score"])
    names = [name for name in VARIANTS if any(name in cell for cell in cells.values())]
    print("| model | task | budget | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 3))
    for (model, task, budget), cell in sorted(cells.items()):
        counts = (f"{sum(s == 1 for s in cell[name])} of {len(cell[name])}" if name in cell else "" for name in names)
        print(f"| {model} | {task} | {budget} | " + " | ".join(counts) + " |")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--tasks", default="")
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the number of the first sample")
    parser.add_argument("--length", type=int, default=1500)
    parser.add_argument("--budgets", default="10%,5%")
    parser.add_argument("--slot-dtype", default="float")
    parser.add_argument("--haystack", default="")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further text after so many")
    args = parser.parse_args()
    if args.model:
        run(args)
    table(args.record)


if __name__ == "__main__":
    main()
