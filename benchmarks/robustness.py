"""What compiled documents and the store promise, tried hard, with the embedded model: kill -9, mutated files, many processes.

    python benchmarks/robustness.py kill 200
    python benchmarks/robustness.py mutate 1000
    python benchmarks/robustness.py together 120
    python benchmarks/robustness.py first-token examples/expedition-log.txt

Each prints one JSON object, and ends with status 1 if a promise was broken.
"""

from __future__ import annotations

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
from keepkv.documents import identity
from keepkv.documents.document import Document, Recipe, compile_text, load, save
from keepkv.documents.store import Store
from keepkv.errors import InputError
from keepkv.models import loading
from keepkv.text.file import read_text
from keepkv.text.prompt import Prompt

RECIPE = Recipe("25%", "snapkv", exact=True)
WORDS = "The whale of number {} was seen off the coast of Nantucket by the keeper of the light, who wrote it down. "


def text(number: int) -> str:
    return WORDS.format(number) * 3


class Right:
    """What every document answers, found once: the highest logits' tokens after a question."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._known: dict[int, list[int]] = {}

    def wrong(self, number: int, document: Document) -> bool:
        told = self._told(document)
        return self._expected(number) != told

    def _expected(self, number: int) -> list[int]:
        if number not in self._known:
            self._known[number] = self._told(compile_text(self.model, self.tokenizer, text(number), RECIPE))
        return self._known[number]

    def _told(self, document: Document) -> list[int]:
        asks = document.question(self.tokenizer, "Which whale?")
        ranked = self.model(asks, past_key_values=document.cache.fork(), logits_to_keep=1).logits[0, -1].topk(5).indices
        return list(map(int, ranked))


def kill(model: Any, tokenizer: Any, count: int) -> dict[str, Any]:
    """Processes that compile to a file and work with a store are killed at a random moment, one after the other."""
    folder = Path(tempfile.mkdtemp())
    rng, right, broken = random.Random(0), Right(model, tokenizer), Counter[str]()
    known, cut = identity.of_model(model), identity.of_tokenizer(tokenizer)
    finished: dict[str, int] = {}
    at, files = Counter[str](), 0
    for number in range(6):
        right._expected(number)
    for turn in range(count):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            _work(folder, model, tokenizer, turn, write)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as told:
            assert told.readline().strip() == "begin"
            time.sleep(rng.uniform(0, 0.7))
            os.kill(child, signal.SIGKILL)
            lines = told.read().splitlines()
        os.waitpid(child, 0)
        for line in lines:
            what, *rest = line.split()
            if what == "added":
                finished[rest[0]] = int(rest[1])
            elif what == "removing":
                finished.pop(rest[0], None)
        at[lines[-1].split()[0] if lines else "begin"] += 1
        plain = folder / "plain.keep"
        if plain.exists():
            files += 1
            try:
                made = load(plain, model, cut, known)
                broken["wrong file"] += right.wrong(int(made.source), made)
            except InputError:
                broken["broken file"] += 1
        with Store(folder / "store") as store:
            store.collect()
            shelf = store.for_model(model, tokenizer)
            kept = {entry.key: entry for entry in store.entries()}
            broken["lost"] += len(set(finished) - set(kept))
            for key, entry in kept.items():
                document = shelf.get(key)
                broken["wrong entry"] += document is None or right.wrong(int(entry.source), document)
    left = len(list(folder.rglob("*.tmp")))
    shutil.rmtree(folder)
    return {"kills": count, "during": dict(at), "files_checked": files, "finished": len(finished), "scratch_left": left,
            "broken": {k: v for k, v in broken.items() if v}}  # fmt: skip


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
    known, cut = identity.of_model(model), identity.of_tokenizer(tokenizer)
    file, bad = folder / "good.keep", folder / "bad.keep"
    save(compile_text(model, tokenizer, text(0), RECIPE, "0"), file, known, cut)
    good, raw = load(file, model, cut, known), file.read_bytes()
    header = int.from_bytes(raw[:8], "little")
    seen, before = Counter[str](), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
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
            told = bytes(data[8 : 8 + header])
            digits = [i for i, byte in enumerate(told) if chr(byte).isdigit()]
            data[8 + rng.choice(digits)] = ord("9")
        bad.write_bytes(data)
        try:
            made = load(bad, model, cut, known)
            same = all(
                torch.equal(a, b)
                for x, y in zip(made.cache.keep_layers, good.cache.keep_layers, strict=True)
                for a, b in zip((*x.slots.tensors, x.keys, x.values), (*y.slots.tensors, y.keys, y.values), strict=True)
            )
            same = same and all(torch.equal(a, b) for i in range(30) for a, b in zip(made.exact(i), good.exact(i), strict=True))
            seen["equal" if same else "WRONG"] += 1
        except InputError:
            seen["refused"] += 1
        except Exception as error:
            seen[f"CRASH {type(error).__name__}"] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    shutil.rmtree(folder)
    broken = {name: n for name, n in seen.items() if name not in ("equal", "refused")}
    if grown > 200_000:
        broken["memory"] = grown
    return {"files": count, "bytes_each": len(raw), "outcomes": dict(seen), "grown_kb": grown, "broken": broken}


def together(model: Any, tokenizer: Any, seconds: int) -> dict[str, Any]:
    """Four processes add, ask, remove and collect in one store at once."""
    folder, right, children = Path(tempfile.mkdtemp()), Right(model, tokenizer), []
    for number in range(8):
        right._expected(number)
    for worker in range(4):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            rng, end, done = random.Random(worker), time.monotonic() + seconds, Counter[str]()
            try:
                shelf = Store(folder).for_model(model, tokenizer)
                while time.monotonic() < end:
                    number = rng.randrange(8)
                    document = shelf.ask_for(text(number), RECIPE, str(number))
                    done["asked"] += 1
                    done["WRONG"] += right.wrong(number, document)
                    if rng.random() < 0.1:
                        shelf.store.collect(rng.choice((None, 12e6)))
                        done["collected"] += 1
                    if rng.random() < 0.05:
                        shelf.store.remove(rng.choice(shelf.store.entries()).key)
                        done["removed"] += 1
            except BaseException as error:
                done[f"ERROR {type(error).__name__}: {error}"] += 1
            os.write(write, json.dumps(done).encode())
            os._exit(0)
        os.close(write)
        children.append((child, read))
    done = Counter[str]()
    for child, read in children:
        with os.fdopen(read) as told:
            said = told.read()
        os.waitpid(child, 0)
        done.update(json.loads(said) if said else {"ERROR died": 1})
    shutil.rmtree(folder)
    broken = {name: n for name, n in done.items() if n and name not in ("asked", "collected", "removed")}
    return {"seconds": seconds, "processes": 4, "done": dict(done), "broken": broken}


def first_token(model: Any, tokenizer: Any, file: str) -> dict[str, Any]:
    """Seconds to a question's first token: from the text, and from its .keep file with all its checks; medians of three."""
    body, folder = read_text(file), Path(tempfile.mkdtemp())
    target = folder / "text.keep"
    document = compile_text(model, tokenizer, body, Recipe("10%", repeat="never"))
    save(document, target, model, tokenizer)
    known, cut = identity.of_model(model), identity.of_tokenizer(tokenizer)
    reading, loaded, again = [], [], []
    for _ in range(3):
        start = time.perf_counter()
        prompt = Prompt(tokenizer, body)
        cache = KeepCache(model, 1.0, "full")
        model(torch.cat([prompt.text, prompt.question("Who?")], 1), past_key_values=cache, logits_to_keep=1)
        reading.append(time.perf_counter() - start)
        for times, identities in ((loaded, None), (again, known)):
            start = time.perf_counter()
            made = load(target, model, tokenizer if identities is None else cut, identities)
            model(made.question(tokenizer, "Who?"), past_key_values=made.cache, logits_to_keep=1)
            times.append(time.perf_counter() - start)
    whole, file_seconds, more = map(statistics.median, (reading, loaded, again))
    told = {"tokens": document.tokens, "file_bytes": target.stat().st_size, "reading_s": whole, "file_s": file_seconds,
            "file_identity_known_s": more, "times": whole / file_seconds, "times_identity_known": whole / more}  # fmt: skip
    shutil.rmtree(folder)
    return {**told, "broken": {} if whole / file_seconds >= 10 else {"slow": 1}}


def main() -> None:
    torch.set_num_threads(1)  # before any work: processes are forked
    torch.set_grad_enabled(False)
    what, how = sys.argv[1:]
    model, tokenizer = loading.load()
    found = {"kill": kill, "mutate": mutate, "together": together, "first-token": first_token}[what](
        model, tokenizer, int(how) if how.isdigit() else how
    )  # type: ignore[operator]
    print(json.dumps({"what": what, **found}))
    sys.exit(bool(found["broken"]))


if __name__ == "__main__":
    main()
