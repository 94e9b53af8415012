"""What compiled documents and the store promise, tried hard, with the embedded model: kill -9, mutated files, many processes.

    python benchmarks/robustness.py kill 200
    python benchmarks/robustness.py mutate 1000
    python benchmarks/robustness.py together 120
    python benchmarks/robustness.py first-token examples/expedition-log.txt

Each prints one JSON object, and ends with status 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from keepkv import KeepCache
from keepkv.documents.document import Document, Recipe, compile_text, load, save
from keepkv.documents.store import Store
from keepkv.errors import InputError
from keepkv.models import identity, loading
from keepkv.text.file import read_text
from keepkv.text.prompt import Prompt

RECIPE = Recipe("25%", "snapkv", exact=True)
WORDS = "The whale of number {} was seen off the coast of Nantucket by the keeper of the light, who wrote it down. "


def text(number: int) -> str:
    return WORDS.format(number) * 3


class Right:
    """What every document answers, computed once: the tokens of the highest logits after a question."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._expected_answers: dict[int, list[int]] = {}

    def wrong(self, number: int, document: Document) -> bool:
        answer = self._answer(document)
        return self._expected(number) != answer

    def _expected(self, number: int) -> list[int]:
        if number not in self._expected_answers:
            self._expected_answers[number] = self._answer(compile_text(self.model, self.tokenizer, text(number), RECIPE))
        return self._expected_answers[number]

    def _answer(self, document: Document) -> list[int]:
        asks = document.question(self.tokenizer, "Which whale?")
        best_tokens = self.model(asks, past_key_values=document.cache.fork(), logits_to_keep=1).logits[0, -1].topk(5).indices
        return list(map(int, best_tokens))


def kill(model: Any, tokenizer: Any, count: int) -> dict[str, Any]:
    """Processes that compile to a file and work with a store are killed at a random moment, one after the other."""
    folder = Path(tempfile.mkdtemp())
    rng, right, broken = random.Random(0), Right(model, tokenizer), Counter[str]()
    model_id, tokenizer_id = identity.of_model(model), identity.of_tokenizer(tokenizer)
    finished: dict[str, int] = {}
    at, files = Counter[str](), 0
    for number in range(6):
        right._expected(number)
    for turn in range(count):
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            os.close(read_end)
            _work(folder, model, tokenizer, turn, write_end)
            os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end) as reader:
            assert reader.readline().strip() == "begin"
            time.sleep(rng.uniform(0, 0.7))
            os.kill(child, signal.SIGKILL)
            lines = reader.read().splitlines()
        os.waitpid(child, 0)
        for line in lines:
            what, *rest = line.split()
            if what == "added":
                finished[rest[0]] = int(rest[1])
            elif what == "removing":
                finished.pop(rest[0], None)
        at[lines[-1].split()[0] if lines else "begin"] += 1
        file = folder / "plain.keep"
        if file.exists():
            files += 1
            try:
                document = load(file, model, tokenizer_id, model_id)
                broken["wrong file"] += right.wrong(int(document.source), document)
            except InputError:
                broken["broken file"] += 1
        with Store(folder / "store") as store:
            store.collect()
            shelf = store.for_model(model, tokenizer)
            entries = {entry.key: entry for entry in store.entries()}
            broken["lost"] += len(set(finished) - set(entries))
            for key, entry in entries.items():
                document = shelf.get(key)
                broken["wrong entry"] += document is None or right.wrong(int(entry.source), document)
    scratch_files = len(list(folder.rglob("*.tmp")))
    shutil.rmtree(folder)
    return {
        "kills": count,
        "during": dict(at),
        "files_checked": files,
        "finished": len(finished),
        "scratch_left": scratch_files,
        "broken": {name: n for name, n in broken.items() if n},
    }


def _work(folder: Path, model: Any, tokenizer: Any, turn: int, pipe: int) -> None:
    def tell(line: str) -> None:
        os.write(pipe, f"{line}\n".encode())

    rng = random.Random(turn)
    store = Store(folder / "store")
    shelf = store.for_model(model, tokenizer)
    model_id, tokenizer_id = shelf.model_id, shelf.tokenizer_id
    ready = {n: compile_text(model, tokenizer, text(n), RECIPE, str(n)) for n in range(turn % 3)}
    tell("begin")
    while True:  # two turns of three find documents that are compiled already, so that more kills hit the writing
        number = rng.randrange(max(1, turn % 3) if ready else 6)
        tell("compiling")
        document = ready.get(number) or compile_text(model, tokenizer, text(number), RECIPE, str(number))
        tell("saving")
        save(document, folder / "plain.keep", model_id, tokenizer_id)
        tell("adding")
        entry = shelf.put(document)
        tell(f"added {entry.key} {number}")
        if rng.random() < 0.3:
            last = store.entries()[-1]
            tell(f"removing {last.key}")
            store.remove(last.key)
            tell("removed")
        tell("collecting")
        store.collect()


def mutate(model: Any, tokenizer: Any, count: int) -> dict[str, Any]:
    """Files with changed, missing, added and forged bytes are opened; nothing but the saved document may come out."""
    folder, rng = Path(tempfile.mkdtemp()), random.Random(0)
    model_id, tokenizer_id = identity.of_model(model), identity.of_tokenizer(tokenizer)
    file, bad = folder / "good.keep", folder / "bad.keep"
    save(compile_text(model, tokenizer, text(0), RECIPE, "0"), file, model_id, tokenizer_id)
    good, raw = load(file, model, tokenizer_id, model_id), file.read_bytes()
    header = int.from_bytes(raw[:8], "little")
    outcomes, before = Counter[str](), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        data = bytearray(raw)
        kind = ("length", "header", "anywhere", "cut", "replaced", "swapped")[number % 6]
        if kind in ("length", "header", "anywhere"):
            data[rng.randrange({"length": 8, "header": 8 + header, "anywhere": len(data)}[kind])] ^= rng.randrange(1, 256)
        elif kind == "cut":
            del data[rng.randrange(len(data)) :]
        elif kind == "replaced":
            lo = rng.randrange(len(data))
            data[lo : lo + rng.randrange(200)] = rng.randbytes(rng.randrange(200))
        else:  # numbers of the header made larger, the file's length kept
            header_text = bytes(data[8 : 8 + header])
            digits = [i for i, byte in enumerate(header_text) if chr(byte).isdigit()]
            data[8 + rng.choice(digits)] = ord("9")
        bad.write_bytes(data)
        try:
            document = load(bad, model, tokenizer_id, model_id)
            same = all(
                torch.equal(a, b)
                for x, y in zip(document.cache.keep_layers, good.cache.keep_layers, strict=True)
                for a, b in zip((*x.slots.tensors, x.keys, x.values), (*y.slots.tensors, y.keys, y.values), strict=True)
            )
            same = same and all(
                torch.equal(a, b) for i in range(30) for a, b in zip(document.exact(i), good.exact(i), strict=True)
            )
            outcomes["equal" if same else "WRONG"] += 1
        except InputError:
            outcomes["refused"] += 1
        except Exception as error:
            outcomes[f"CRASH {type(error).__name__}"] += 1
    memory_growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    shutil.rmtree(folder)
    broken = {name: n for name, n in outcomes.items() if name not in ("equal", "refused")}
    if memory_growth > 200_000:
        broken["memory"] = memory_growth
    return {"files": count, "bytes_each": len(raw), "outcomes": dict(outcomes), "grown_kb": memory_growth, "broken": broken}


def together(model: Any, tokenizer: Any, seconds: int) -> dict[str, Any]:
    """Four processes add, ask, remove and collect in one store at once."""
    folder, right, children = Path(tempfile.mkdtemp()), Right(model, tokenizer), []
    for number in range(8):
        right._expected(number)
    for worker in range(4):
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            os.close(read_end)
            rng, end, counts = random.Random(worker), time.monotonic() + seconds, Counter[str]()
            try:
                shelf = Store(folder).for_model(model, tokenizer)
                while time.monotonic() < end:
                    number = rng.randrange(8)
                    document = shelf.ask_for(text(number), RECIPE, str(number))
                    counts["asked"] += 1
                    counts["WRONG"] += right.wrong(number, document)
                    if rng.random() < 0.1:
                        shelf.store.collect(rng.choice((None, 12e6)))
                        counts["collected"] += 1
                    if rng.random() < 0.05:
                        shelf.store.remove(rng.choice(shelf.store.entries()).key)
                        counts["removed"] += 1
            except BaseException as error:
                counts[f"ERROR {type(error).__name__}: {error}"] += 1
            os.write(write_end, json.dumps(counts).encode())
            os._exit(0)
        os.close(write_end)
        children.append((child, read_end))
    counts = Counter[str]()
    for child, read_end in children:
        with os.fdopen(read_end) as reader:
            message = reader.read()
        os.waitpid(child, 0)
        counts.update(json.loads(message) if message else {"ERROR died": 1})
    shutil.rmtree(folder)
    broken = {name: n for name, n in counts.items() if n and name not in ("asked", "collected", "removed")}
    return {"seconds": seconds, "processes": 4, "done": dict(counts), "broken": broken}


def first_token(model: Any, tokenizer: Any, file: str) -> dict[str, Any]:
    """Seconds to a question's first token: from the text, and from its .keep file with all its checks; medians of three."""
    body, folder = read_text(file), Path(tempfile.mkdtemp())
    target = folder / "text.keep"
    document = compile_text(model, tokenizer, body, Recipe("10%", repeat="never"))
    save(document, target, model, tokenizer)
    model_id, tokenizer_id = identity.of_model(model), identity.of_tokenizer(tokenizer)
    reading, loaded, again = [], [], []
    for _ in range(3):
        start = time.perf_counter()
        prompt = Prompt(tokenizer, body)
        cache = KeepCache(model, 1.0, "full")
        model(torch.cat([prompt.text, prompt.question("Who?")], 1), past_key_values=cache, logits_to_keep=1)
        reading.append(time.perf_counter() - start)
        for times, identities in ((loaded, None), (again, model_id)):
            start = time.perf_counter()
            document_again = load(target, model, tokenizer if identities is None else tokenizer_id, identities)
            model(document_again.question(tokenizer, "Who?"), past_key_values=document_again.cache, logits_to_keep=1)
            times.append(time.perf_counter() - start)
    reading_seconds, file_seconds, known_seconds = map(statistics.median, (reading, loaded, again))
    result = {
        "tokens": document.tokens,
        "file_bytes": target.stat().st_size,
        "reading_s": reading_seconds,
        "file_s": file_seconds,
        "file_identity_known_s": known_seconds,
        "times": reading_seconds / file_seconds,
        "times_identity_known": reading_seconds / known_seconds,
    }
    shutil.rmtree(folder)
    return {**result, "broken": {} if reading_seconds / file_seconds >= 10 else {"slow": 1}}


def main() -> None:
    torch.set_num_threads(1)  # before any work: processes are forked
    torch.set_grad_enabled(False)
    checks = {"kill": kill, "mutate": mutate, "together": together, "first-token": first_token}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=checks)
    parser.add_argument("how", help="how many kills, files or seconds; of first-token a text file")
    args = parser.parse_args()
    model, tokenizer = loading.load()
    outcome = checks[args.what](model, tokenizer, args.how if args.what == "first-token" else int(args.how))  # type: ignore[operator]
    print(json.dumps({"what": args.what, **outcome}))
    sys.exit(bool(outcome["broken"]))


if __name__ == "__main__":
    main()
