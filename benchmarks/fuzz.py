"""Fuzzing: whatever a file or an argument holds, keepkv reads it or says in one of its own errors why not.

    python benchmarks/fuzz.py keep 1000000
    python benchmarks/fuzz.py all 2000 --seed 7

Targets: keep (.keep files whose digests are right and whose content is not), bytes (.keep files with damaged bytes), index,
conversation, records, config, budget, regex. An input that ends in anything but a KeepKVError, takes more than ten seconds, or
makes the process grow is a failure, and is written into the folder of --out. What was read must also be usable: a document
answers, a conversation is shown. Inputs are drawn from seed, target and number. Those that found something are in
tests/corpus. Prints one JSON object, and ends with status 1 for a failure.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from keepkv import Recipe
from keepkv.budget import Budget
from keepkv.documents import format
from keepkv.documents.document import Document, compile_text, load, save
from keepkv.documents.store import Store
from keepkv.errors import KeepKVError
from keepkv.eval import config as settings
from keepkv.eval import records, summary
from keepkv.models import identity
from keepkv.text.conversation import Conversation
from keepkv.text.prompt import Prompt

TEXT = "The whale was seen off the coast of Nantucket by the keeper of the light, who wrote it down. " * 2
PATIENCE = 10  # seconds for one input
ROOM = 400_000  # kilobytes that all inputs together may make the process grow
NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 7, 2**31, 10**9, 10**12, 2**63, -(2**63), 10**400, 0.5, -0.5, 1e300, math.nan, math.inf,
    -math.inf,    "", "x", "../../x", "/", "\0", "\ud800", "é" * 300, "10%", "FILE.py:NAME",
    [], [[]], [0], [None], ["x"] * 9, {}, {"x": 1},
    {"seen": 5},
]  # fmt: skip


def tiny_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model of two layers and a byte tokenizer with a chat template."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **ends, num_key_value_heads=2, max_position_embeddings=2048)).eval()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!", pad_token="!", chat_template=template)


class Target:
    """What is fuzzed: `make` draws an input as bytes, `read` reads and uses it. Raises KeepKVError, or it is a failure."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, rng: random.Random) -> bytes:
        raise NotImplementedError

    def read(self, data: bytes) -> None:
        raise NotImplementedError


def mutated(value: Any, rng: random.Random) -> Any:
    """JSON with one to three values replaced, removed, doubled or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        how = rng.random()
        if how < 0.6:
            holder[key] = copy.deepcopy(rng.choice(NASTY))
        elif how < 0.75:
            del holder[key]
        elif how < 0.85 and isinstance(holder[key], int | float):
            holder[key] = holder[key] * rng.choice((-1, 2, 10**6)) + rng.choice((-1, 0, 1))
        elif isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        else:
            other = rng.choice(places)
            holder[key] = copy.deepcopy(other[0][other[1]])
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes that were changed, cut, put in or exchanged."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(data) + 1)
        how = rng.randrange(4)
        if how == 0 and place < len(data):
            data[place] ^= rng.randrange(1, 256)
        elif how == 1:
            del data[place:]
        elif how == 2:
            data[place : place + rng.randrange(64)] = rng.randbytes(rng.randrange(64))
        elif place < len(data):
            data[place:place] = data[rng.randrange(len(data)) :][: rng.randrange(64)]
    return bytes(data)


class Keep(Target):
    """.keep files with forged headers or tensors, and digests that are right."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model, self.tokenizer = tiny_model()
        self.model_id, self.tokenizer_id = identity.of_model(self.model), identity.of_tokenizer(self.tokenizer)
        self.goods = []
        for number, recipe in enumerate((Recipe("30%", "snapkv", "int4"), Recipe("30%", "keepkv", "float", exact=True))):
            file = folder / f"{number}.keep"
            save(compile_text(self.model, self.tokenizer, TEXT, recipe), file, self.model_id, self.tokenizer_id, number == 0)
            self.goods.append((dict(format.Contents(file).header), load_file(file)))
        self.file = folder / "fuzzed.keep"

    def make(self, rng: random.Random) -> bytes:
        header, tensors = rng.choice(self.goods)
        tensors = dict(tensors)
        if rng.random() < 0.3:
            name = rng.choice(sorted(tensors))
            tensors[name] = _forged(tensors[name], rng)
        else:
            header = mutated({name: value for name, value in header.items() if name not in ("tensors", "format")}, rng)
        signed = {**header, "format": header.get("format", format.FORMAT)} if isinstance(header, dict) else {}
        signed["tensors"] = {name: format._tensor_digest(tensor) for name, tensor in tensors.items()}
        try:
            signed["digest"] = format._digest(signed)
        except (TypeError, ValueError):  # keys of several kinds
            signed["digest"] = ""
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, self.file, {"keepkv": json.dumps(signed)})
        return self.file.read_bytes()

    def read(self, data: bytes) -> None:
        self.file.write_bytes(data)
        document = load(self.file, self.model, self.tokenizer_id, self.model_id)
        self.use(document)

    def use(self, document: Document) -> None:
        question = document.question(self.tokenizer, "Who?")
        logits = self.model(question, past_key_values=document.cache.fork(), logits_to_keep=1).logits
        if not bool(logits.isfinite().all()):
            raise ArithmeticError("the answer is no number")
        repr(document.cache)
        document.recipe.to_dict()
        if document.ids is None:
            torch.zeros(1, document.tokens, dtype=torch.int64)
        if document.exact is not None:
            document.exact(0)


def _forged(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Another tensor in place of one."""
    ways: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: x[:-1],
        lambda x: torch.cat([x, x[-1:]]),
        lambda x: x.flip(0),
        lambda x: x.double(),
        lambda x: x.half(),
        lambda x: x.to(torch.int64),
        lambda x: x * 0 - 1 if x.dtype != torch.uint8 else x * 0 + 255,
        lambda x: x * 0,
        lambda x: x.double().fill_(math.nan).to(x.dtype) if x.is_floating_point() else x + 10**4,
        lambda x: x.double().fill_(math.inf).to(x.dtype) if x.is_floating_point() else x - 10**4,
        lambda x: x[..., None],
        lambda x: x.reshape(-1),
        lambda x: torch.zeros(0, dtype=x.dtype),
        lambda x: torch.zeros((10**6, *x.shape[1:-1], 0), dtype=x.dtype),
    ]
    try:
        return rng.choice(ways)(tensor).contiguous()
    except (RuntimeError, IndexError, ValueError):
        return tensor


class Bytes(Keep):
    """.keep files with damaged bytes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.wholes = [(folder / f"{number}.keep").read_bytes() for number in range(len(self.goods))]

    def make(self, rng: random.Random) -> bytes:
        return damaged(rng.choice(self.wholes), rng)


class IndexFile(Target):
    """The index of a store, damaged: it is made again from the files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model, self.tokenizer = tiny_model()
        with Store(folder / "store") as store:
            shelf = store.for_model(self.model, self.tokenizer)
            self.keys = {shelf.add(f"{n} {TEXT}", Recipe("30%", "snapkv"))[0].key for n in range(2)}
        self.file = folder / "store" / "index.sqlite3"
        self.whole = self.file.read_bytes()

    def make(self, rng: random.Random) -> bytes:
        return damaged(self.whole, rng)

    def read(self, data: bytes) -> None:
        for suffix in ("-wal", "-shm"):
            self.file.with_name(self.file.name + suffix).unlink(missing_ok=True)
        self.file.write_bytes(data)
        with Store(self.folder / "store") as store:
            store.collect()
            if {entry.key for entry in store.entries()} != self.keys:
                raise LookupError("an entry is lost")


class Talk(Target):
    """Saved conversations."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.pair = tiny_model()
        talk = Conversation(*self.pair, system="Be brief.")
        talk.say("Hello", max_new_tokens=2)
        self.file = folder / "talk.json"
        talk.save(self.file)
        self.good = json.loads(self.file.read_text())
        self.talk = talk

    def make(self, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return damaged(json.dumps(self.good).encode(), rng)
        return json.dumps(mutated(self.good, rng)).encode()

    def read(self, data: bytes) -> None:
        self.file.write_bytes(data)
        self.talk.load(self.file)
        for turn in self.talk.turns:
            f"{turn.user} {turn.answer}".encode()


class Records(Target):
    """Records of an evaluation."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        record = records.Record("tiny", "facts", 64, 0, 0, "snapkv", "10%", score=1.0, chances=(0.1, 0.2), of=1, ask="Who?")
        full = records.Record("tiny", "facts", 64, 0, 0, "full", "100%", score=1.0, chances=(0.1, 0.2), of=1, ask="Who?")
        self.good = [json.loads(each.line()) for each in (record, full)]

    def make(self, rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return damaged("".join(json.dumps(line) + "\n" for line in self.good).encode(), rng)
        return "".join(json.dumps(mutated(line, rng)) + "\n" for line in self.good).encode()

    def read(self, data: bytes) -> None:
        (self.folder / records.FILE).write_bytes(data)
        summary.summarize(records.load_records(self.folder))


class Config(Target):
    """The settings of an evaluation."""

    def make(self, rng: random.Random) -> bytes:
        good = settings.to_toml(settings.Config()).encode()
        if rng.random() < 0.5:
            return damaged(good, rng)
        lines = good.decode().splitlines()
        place = rng.randrange(len(lines))
        value = rng.choice(
            ("true", "-1", "10" * 200, "[]", "[1]", '["x"]', '""', "nan", "inf", "1979-05-27", "{a = 1}", '"\\u0000"')
        )
        lines[place] = f"{lines[place].partition(' = ')[0]} = {value}"
        return "\n".join(lines).encode()

    def read(self, data: bytes) -> None:
        (self.folder / "config.toml").write_bytes(data)
        settings.load_config(self.folder / "config.toml")


class Budgets(Target):
    """Budgets as they are typed."""

    def make(self, rng: random.Random) -> bytes:
        pieces = [
            "1",
            "0",
            "9" * 400,
            ".",
            "e",
            "E",
            "-",
            "+",
            "%",
            "MB",
            "MiB",
            "kb",
            "inf",
            "nan",
            " ",
            "x",
            "_",
            "١",
            "²",
            "\n",
        ]
        return "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 7))).encode()

    def read(self, data: bytes) -> None:
        budget = Budget.parse(data.decode(errors="replace"))
        from keepkv.slots.slot_dtype import SLOT_DTYPES

        total = budget.total_slots(100, 6, SLOT_DTYPES["int8"].price(16, 16, 4))
        if not 0 <= total <= 600:
            raise ArithmeticError(f"{total} slots")


class Patterns(Target):
    """Regular expressions as they are typed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.prompt = Prompt(tiny_model()[1], TEXT + "a" * 40)

    def make(self, rng: random.Random) -> bytes:
        pieces = "( ) a a+ (a+)+ * + ? {9} {99999} [ ] ^ $ | (?: (?P<x> (?<= (?R) . whale (?i) é (?#"
        pieces = [*pieces.split(" "), "\\1", "\\", "\\w", "\0", " "]
        return "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 8))).encode()

    def read(self, data: bytes) -> None:
        for first, last in self.prompt.spans(data.decode()):
            if not 0 <= first < last <= self.prompt.text.shape[1]:
                raise IndexError("a span outside the text")


TARGETS: dict[str, type[Target]] = {
    "keep": Keep, "bytes": Bytes, "index": IndexFile, "conversation": Talk, "records": Records, "config": Config,
    "budget": Budgets, "regex": Patterns,
}  # fmt: skip


def outcome(target: Target, data: bytes) -> str:
    """What becomes of an input: "read", "refused", or what went wrong."""
    signal.alarm(PATIENCE)
    try:
        target.read(data)
    except KeepKVError:
        return "refused"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"FAILED {type(error).__name__}: {str(error)[:80]} ({Path(place.filename).name}:{place.lineno})"
    finally:
        signal.alarm(0)
    return "read"


def fuzz(name: str, count: int, seed: int, out: Path | None) -> dict[str, Any]:
    """So many inputs for one target."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        target = TARGETS[name](Path(folder))
        outcomes, start = Counter[str](), time.monotonic()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            data = target.make(random.Random(f"{seed} {name} {number}"))
            result = outcome(target, data)
            outcomes[result] += 1
            if result.startswith("FAILED") and out is not None and outcomes[result] == 1:
                out.mkdir(parents=True, exist_ok=True)
                (out / f"{name}-{seed}-{number}").write_bytes(data)
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    broken = {result: number for result, number in outcomes.items() if result.startswith("FAILED")}
    if growth > ROOM:
        broken["grown_kb"] = growth
    seconds = round(time.monotonic() - start, 1)
    return {
        "target": name,
        "inputs": count,
        "seconds": seconds,
        "outcomes": dict(outcomes),
        "grown_kb": growth,
        "broken": broken,
    }


def _late(number: int, frame: Any) -> None:
    raise TimeoutError(f"more than {PATIENCE} seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("count", type=int, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for inputs that fail")
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    names = list(TARGETS) if args.target == "all" else [args.target]
    results = [fuzz(name, args.count, args.seed, args.out) for name in names]
    broken = {result["target"]: result["broken"] for result in results if result["broken"]}
    print(json.dumps({"seed": args.seed, "results": results, "broken": broken}))
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
