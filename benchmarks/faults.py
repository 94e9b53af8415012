"""Every fault that a trial by users and attackers has found, tried again: what is tried, what comes of it, right or wrong.

    python benchmarks/faults.py
    python benchmarks/faults.py 11 12c serve

Each has its number in the issue "Nothing silently wrong" and, where that names several, a letter. Each is tried in a process of
its own, which may hang, be killed or run out of memory. Ends with status 1 if one is wrong.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PATIENCE = 900  # seconds for one fault
HERE = Path(__file__).resolve()


class Fault(NamedTuple):
    """What is tried. `attempt` is given a folder, and returns what came of it and whether that is right."""

    number: str
    tried: str
    attempt: Callable[[Path], tuple[str, bool]]


FAULTS: dict[str, Fault] = {}


def fault(number: str, tried: str) -> Callable[[Callable[[Path], tuple[str, bool]]], Callable[[Path], tuple[str, bool]]]:
    def add(attempt: Callable[[Path], tuple[str, bool]]) -> Callable[[Path], tuple[str, bool]]:
        FAULTS[number] = Fault(number, tried, attempt)
        return attempt

    return add


def refused(call: Callable[[], Any], words: str = "") -> tuple[str, bool]:
    """Right if one of keepkv's own errors comes, with these words in it."""
    from keepkv.errors import KeepKVError

    try:
        result = call()
    except KeepKVError as error:
        return f"{type(error).__name__}: {str(error)[:150]}", words in str(error)
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:150]}", False
    return f"no error: {str(result)[:80]!r}", False


def tiny() -> tuple[Any, Any]:
    sys.path.insert(0, str(HERE.parent))
    from fuzz import tiny_model

    return tiny_model()


TEXT = "The whale was seen off the coast of Nantucket by the keeper of the light, who wrote it down. " * 4


def document(folder: Path, model: Any, tokenizer: Any, name: str = "a.keep", **more: Any) -> Path:
    from keepkv import Recipe, compile_text, save

    save(compile_text(model, tokenizer, TEXT, Recipe("30%", "snapkv", **more)), folder / name, model, tokenizer)
    return folder / name


def fuzzed(what: str, count: int, seed: int) -> dict[str, Any]:
    """What came of so many drawn inputs of a parser, see fuzz.py."""
    sys.path.insert(0, str(HERE.parent))
    import fuzz

    signal.signal(signal.SIGALRM, fuzz._late)
    result: dict[str, Any] = fuzz.fuzz(what, count, seed, None)
    return result


def _fill(file: Path) -> None:
    """Writes until the disk is full."""
    number = os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(number, b"x" * 4096)
    except OSError:
        os.close(number)


def full(path: Path) -> None:
    raise OSError(28, "No space left on device")


@fault("4a", "a .keep file of a model with another rms_norm_eps, of the same weights")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv import load

    model, tokenizer = tiny()
    file = document(folder, model, tokenizer)
    results = []
    for name, value in (("rms_norm_eps", 1e-3), ("hidden_act", "gelu"), ("max_position_embeddings", 77)):
        before = getattr(model.config, name)
        setattr(model.config, name, value)
        results.append(refused(lambda: load(file, model, tokenizer), f"another configuration ({name}"))
        setattr(model.config, name, before)
    load(file, model, tokenizer)
    return results[0][0], all(right for _, right in results)


@fault("4b", "a store with documents of two models, asked by one of them (Store.longest)")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv import Recipe, Store

    model, tokenizer = tiny()
    recipe = Recipe("100%", "full")
    with Store(folder / "store") as store:
        shelf = store.for_model(model, tokenizer)
        shelf.add(TEXT, recipe)
        model.model.norm.weight.data += 1
        other = store.for_model(model, tokenizer)
        other.add(TEXT, recipe)
        entry = store.entries()[0]
        ids = other.get(entry.key).ids
        found = [each.longest(ids) for each in (other, shelf)]
    return f"{[match and match[1] for match in found]} of {ids.shape[1]} tokens", all(found)


@fault("10a", "/save of a conversation on a full disk, over a good one")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv import paths
    from keepkv.text.conversation import Conversation

    talk = Conversation(*tiny())
    talk.say("Hello", max_new_tokens=2)
    talk.save(folder / "talk.json")
    good = (folder / "talk.json").read_bytes()
    paths.flush = full
    result, right = refused(lambda: talk.save(folder / "talk.json"), "cannot be written (No space")
    same = (folder / "talk.json").read_bytes() == good
    return f"{result}; the file is {'as it was' if same else 'torn'}", right and same


@fault("10b", "a conversation of another tokenizer of the same size")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv.text.conversation import Conversation

    model, tokenizer = tiny()
    talk = Conversation(model, tokenizer)
    talk.say("Hello", max_new_tokens=2)
    talk.save(folder / "talk.json")
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = raw["model"]["vocab"]
    raw["model"]["vocab"] = {token: 255 - number for token, number in vocabulary.items()}
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    turned = Tokenizer.from_str(json.dumps(raw))
    other = PreTrainedTokenizerFast(tokenizer_object=turned, eos_token="!", chat_template=tokenizer.chat_template)
    return refused(lambda: Conversation(model, other).load(folder / "talk.json"), "another tokenizer")


@fault("10c", "damaged conversations: tokens null, turns of numbers, text with half a surrogate pair")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv.text.conversation import Conversation

    talk = Conversation(*tiny(), system="Be brief.")
    talk.say("Hello", max_new_tokens=2)
    talk.save(folder / "talk.json")
    good = json.loads((folder / "talk.json").read_text())
    results = []
    for change in (
        {"tokens": None}, {"tokens": [None]}, {"turns": [1, 2]}, {"turns": [{"user": 3, "answer": 4}]}, {"system": "\ud800"},
        {"tokens": [2**70]}, {"tokens": []},
    ):  # fmt: skip
        (folder / "bad.json").write_text(json.dumps({**good, **change}))
        results.append(refused(lambda: talk.load(folder / "bad.json"), "is not a conversation"))
    return results[0][0], all(right for _, right in results)


@fault("11a", "1,500 .keep files whose headers or tensors are forged and whose digests are right")
def _(folder: Path) -> tuple[str, bool]:
    result = fuzzed("keep", 1500, 11)
    return f"{result['outcomes']}, {result['grown_kb'] / 1000:.0f} MB more", not result["broken"]


@fault("11b", "a file whose header says 10**9 tokens, and has no token ids")
def _(folder: Path) -> tuple[str, bool]:
    from safetensors.torch import load_file

    from keepkv import Recipe, compile_text, load, save
    from keepkv.documents import format

    model, tokenizer = tiny()
    save(compile_text(model, tokenizer, TEXT, Recipe("30%", "snapkv")), folder / "a.keep", model, tokenizer, with_ids=False)
    header = {k: v for k, v in format.Contents(folder / "a.keep").header.items() if k not in ("tensors", "format")}
    format.write(folder / "b.keep", {**header, "seen": 10**9}, load_file(folder / "a.keep"))
    return refused(lambda: load(folder / "b.keep", model, tokenizer), "is not a whole .keep file")


@fault("11c", "a file with NaN in its keys")
def _(folder: Path) -> tuple[str, bool]:
    import torch
    from safetensors.torch import load_file

    from keepkv import load
    from keepkv.documents import format

    model, tokenizer = tiny()
    file = document(folder, model, tokenizer, slot_dtype="float")
    header = {k: v for k, v in format.Contents(file).header.items() if k not in ("tensors", "format")}
    tensors = load_file(file)
    tensors["layer.0.slots.keys"] = torch.full_like(tensors["layer.0.slots.keys"], float("nan"))
    if hasattr(format, "_is_sound"):
        format._is_sound, sound = (lambda name, tensor: True), format._is_sound
        format.write(file, header, tensors)
        format._is_sound = sound
    else:
        format.write(file, header, tensors)
    return refused(lambda: load(file, model, tokenizer), "no number")


@fault("11d", "a loaded file that is cut short, or written over, in place")
def _(folder: Path) -> tuple[str, bool]:
    import torch

    from keepkv import load

    model, tokenizer = tiny()
    file = document(folder, model, tokenizer)
    loaded = load(file, model, tokenizer)
    question = loaded.question(tokenizer, "Who?")
    before = model(question, past_key_values=loaded.cache.fork()).logits
    with file.open("r+b") as raw:
        raw.seek(9000)
        raw.write(b"\x55" * 20000)
        raw.flush()
    over = model(question, past_key_values=loaded.cache.fork()).logits
    os.truncate(file, 100)
    short = model(question, past_key_values=loaded.cache.fork()).logits
    same = torch.equal(before, over) and torch.equal(before, short)
    return "the same answer" if same else "another answer", same


@fault("11e", "a named pipe in place of a file: load, a text, a conversation, gc of a store")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv import Store, load
    from keepkv.text.conversation import Conversation
    from keepkv.text.file import read_text

    model, tokenizer = tiny()
    os.mkfifo(folder / "pipe.keep")
    results = [
        refused(lambda: load(folder / "pipe.keep", model, tokenizer), "regular file"),
        refused(lambda: read_text(str(folder / "pipe.keep")), "regular file"),
        refused(lambda: Conversation(model, tokenizer).load(folder / "pipe.keep"), "regular file"),
    ]
    with Store(folder) as store:
        store.collect()
    return results[0][0], all(right for _, right in results)


@fault("12a", "a store whose index is damaged, in 300 ways")
def _(folder: Path) -> tuple[str, bool]:
    result = fuzzed("index", 300, 12)
    read = result["outcomes"].get("read", 0)
    return f"{read} of 300 made again from the files, {result['outcomes']}", read == 300


@fault("12b", "a store on a full disk: getting what is there, and adding")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv import Recipe, Store

    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], check=False).returncode
    ):
        return "not tried: needs the right to mount", True
    try:
        model, tokenizer = tiny()
        with Store(folder / "store") as store:
            shelf = store.for_model(model, tokenizer)
            entry, _ = shelf.add(TEXT, Recipe("30%", "snapkv"))
            _fill(folder / "filler")
            there = shelf.get(entry.key) is not None
            result, right = refused(lambda: shelf.add(TEXT + "And more.", Recipe("30%", "snapkv")), "cannot be")
        with Store(folder / "store") as store:
            again = store.for_model(model, tokenizer).get(entry.key) is not None
        return f"there: {there}, opened again: {again}; adding: {result}", there and again and right
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@fault("12c", "a damaged entry of a store is asked for again")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv import Recipe, Store

    model, tokenizer = tiny()
    with Store(folder / "store") as store:
        shelf = store.for_model(model, tokenizer)
        entry, _ = shelf.add(TEXT, Recipe("30%", "snapkv"))
        raw = bytearray(entry.file.read_bytes())
        raw[-5] ^= 1
        entry.file.write_bytes(raw)
        _, new = shelf.add(TEXT, Recipe("30%", "snapkv"))
        return ("compiled again" if new else "there already"), new and shelf.get(entry.key) is not None


@fault("12d", "a store in a folder that can only be read")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv import Recipe, Store

    model, tokenizer = tiny()
    with Store(folder / "store") as store:
        entry, _ = store.for_model(model, tokenizer).add(TEXT, Recipe("30%", "snapkv"))
    mounted = os.geteuid() == 0
    if mounted:
        for options in (["--bind", str(folder / "store")], ["-o", "remount,ro,bind"]):
            if subprocess.run(["mount", *options, str(folder / "store")], check=False, stderr=subprocess.DEVNULL).returncode:
                return "not tried: needs the right to mount", True
    else:
        (folder / "store").chmod(0o500)
    try:
        with Store(folder / "store") as store:
            found = store.for_model(model, tokenizer).get(entry.key)
            return f"{len(store.entries())} entry, read: {found is not None}", found is not None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder / "store")], check=False)


@fault("12e", "what killed conversions have left behind")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv.paths import atomic_folder

    left = folder / ".model.abcd.tmp"
    left.mkdir()
    (left / "weights").write_bytes(b"x" * 1000)
    for path in (left / "weights", left):
        os.utime(path, (0, 0))
    with atomic_folder(folder / "model") as scratch:
        (scratch / "weights").write_bytes(b"y")
    gone = not left.exists()
    return "removed by the next conversion" if gone else "still there", gone


@fault("12f", "who can read documents, their store and conversations")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv import Recipe, Store
    from keepkv.text.conversation import Conversation

    os.umask(0o022)
    model, tokenizer = tiny()
    talk = Conversation(model, tokenizer)
    talk.say("Hello", max_new_tokens=2)
    talk.save(folder / "talk.json")
    with Store(folder / "store") as store:
        entry, _ = store.for_model(model, tokenizer).add(TEXT, Recipe("30%", "snapkv"))
        modes = [oct(path.stat().st_mode & 0o777) for path in (folder / "store", entry.file, folder / "talk.json")]
    return f"{modes}", modes == ["0o700", "0o600", "0o600"]


@fault("13a", "a text, and a system prompt, that hold the internal mark")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv.text.conversation import Conversation
    from keepkv.text.prompt import Prompt

    model, tokenizer = tiny()
    text = "before \u2402keepkv\u2403 \u2402keepkv-0\u2403 after"
    shown = tokenizer.decode(Prompt(tokenizer, text).text[0])
    Conversation(model, tokenizer, system=text).say(text, max_new_tokens=1)
    return repr(shown), text in shown


@fault("13b", "a line that is not UTF-8, in a chat")
def _(folder: Path) -> tuple[str, bool]:
    model, tokenizer = tiny()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    command = [sys.executable, "-m", "keepkv", "chat", "--model", str(folder / "model"), "--max-new-tokens", "3"]
    ran = subprocess.run(command, input=b"caf\xe9\n/report\n", capture_output=True, check=False)
    goes_on = ran.returncode == 0 and b"nothing has been read" in ran.stdout
    return f"status {ran.returncode}: {ran.stderr.decode().strip().splitlines()[-1][:100]}", goes_on


@fault("13c", "chat templates that change, double or drop the text, raise, or want content as a list")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv.text.conversation import Conversation
    from keepkv.text.prompt import Prompt

    model, tokenizer = tiny()
    results = []
    for body in (
        "{{ m.content | upper }}",
        "{{ m.content }}{{ m.content }}",
        "{{ m.role }}",
        "{{ raise('no') }}",
        "{{ m.content[:9] }}",
    ):
        tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>" + body + "{% endfor %}<|assistant|>"
        results.append(refused(lambda: Prompt(tokenizer, TEXT), "chat template does not show"))
        results.append(refused(lambda: Conversation(model, tokenizer), "takes no conversation"))
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}<|assistant|>"
    )
    listed = TEXT.strip() in tokenizer.decode(Prompt(tokenizer, TEXT).text[0])
    return f"{results[0][0]}; a list of parts is read: {listed}", listed and all(right for _, right in results)


@fault("13d", "keepkv report of a crafted run: does it read .txt files outside?")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv.eval import records
    from keepkv.eval.report.worst import texts_of

    (folder / "secret-64-0.txt").write_text("secret")
    run = folder / "run"
    (run / "texts" / "tiny").mkdir(parents=True)
    (run / "texts" / "tiny" / "link-64-0.txt").symlink_to(folder / "secret-64-0.txt")
    find = texts_of([run])
    found = [
        find(records.Record("tiny", task, 64, 0, 0, "", "")) for task in ("../../../secret", "link", str(folder / "secret"))
    ]
    return f"{found}", found == [None] * 3


@fault("13e", "--keep '(a+)+$' on a text of many a")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv.text.prompt import Prompt

    _, tokenizer = tiny()
    prompt = Prompt(tokenizer, "a" * 60 + "b")
    results, start = [], time.monotonic()
    for pattern in (r"(a+)+$", r"(a|a)+$", r"(a*)*c", r"([a-z]+)+\d", r"(?:a?){60}a{60}c"):
        results.append(refused(lambda pattern=pattern: prompt.spans(pattern), ""))
    seconds = time.monotonic() - start
    return f"{sorted({result for result, _ in results})} ({seconds:.0f} s)", all(right for _, right in results) and seconds < 40


@fault("13f", "an error in --method FILE.py")
def _(folder: Path) -> tuple[str, bool]:
    (folder / "own.py").write_text(
        "from keepkv import Method\ndef score(observation):\n    return 1 / 0\nmine = Method('mine', 'a', 'b', score)\n"
    )
    (folder / "text.txt").write_text(TEXT)
    model, tokenizer = tiny()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    command = [sys.executable, "-m", "keepkv", "ask", str(folder / "text.txt"), "Who?", "--model", str(folder / "model")]
    ran = subprocess.run([*command, "--method", f"{folder / 'own.py'}:mine"], capture_output=True, text=True, check=False)
    said = ran.stderr.strip().splitlines()[-1]
    return said[:150], "in your own code" in said and "line 3" in said


def sliding_model() -> Any:
    """A small model whose first layer has full attention, and the others a sliding window."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**sizes, head_dim=8, num_hidden_layers=3, layer_types=kinds, sliding_window=24)
    ).eval()


def tokens(count: int, batch: int = 1) -> Any:
    import torch

    return torch.randint(3, 250, (batch, count), generator=torch.Generator().manual_seed(0))


def lengths(cache: Any) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


@fault("1a", "backing='disk' on a full disk")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv import KeepCache

    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(folder)], check=False).returncode
    ):
        return "not tried: needs the right to mount", True
    try:
        tempfile.tempdir = str(folder)
        model, _ = tiny()
        cache = KeepCache(model, 20, "snapkv", period=64, backing="disk")
        result, right = refused(lambda: cache.read(model, tokens(1500)), "exact keys and values")
        return f"{result}; lengths {lengths(cache)}", right and len(set(lengths(cache))) == 1
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@fault("1b", "backing='disk' without a temporary folder, and with a limit on the size of files")
def _(folder: Path) -> tuple[str, bool]:
    import resource

    from keepkv import KeepCache

    model, _ = tiny()
    results = []
    for number in range(2):
        if number:
            tempfile.tempdir = str(folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        else:
            tempfile.tempdir = str(folder / "none")
        cache = KeepCache(model, 20, "snapkv", period=64, backing="disk")
        results.append(refused(lambda cache=cache: cache.read(model, tokens(500)), "exact keys and values"))
    return "; ".join(result[:90] for result, _ in results), all(right for _, right in results)


@fault("2a", "crop on a model whose full layers come before sliding ones, and the next pass")
def _(folder: Path) -> tuple[str, bool]:
    import torch

    from keepkv import KeepCache

    model = sliding_model()
    cache = KeepCache(model, "100%", "full")
    model(tokens(60), past_key_values=cache)
    twin = cache.fork()
    result, right = refused(lambda: cache.crop(-3))
    ours, theirs = (model(tokens(4), past_key_values=each).logits for each in (cache, twin))
    same = torch.equal(ours, theirs)
    return f"{result}; lengths {lengths(cache)}, the next logits {'are the same' if same else 'differ'}", right and same


@fault("2b", "a forward pass that is interrupted in the middle, and the next one")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv import KeepCache

    model, _ = tiny()
    cache = KeepCache(model, 20, "snapkv")
    model(tokens(60), past_key_values=cache)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    try:
        model(tokens(4), past_key_values=cache)
    except KeyboardInterrupt:
        hook.remove()
    result, right = refused(lambda: model(tokens(4), past_key_values=cache), "torn")
    return f"lengths {lengths(cache)}; {result}", right


@fault("3", "a cache used with another model: of another size, and with other weights")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv import KeepCache

    model, _ = tiny()
    other, _ = tiny()
    other.model.layers[0].self_attn.k_proj.weight.data += 1
    results = []
    for number, wrong in enumerate((sliding_model(), other)):
        cache = KeepCache(model, 20, "snapkv")
        cache.read(model, tokens(60))
        results.append(refused(lambda cache=cache, wrong=wrong: cache.read(wrong, tokens(4)), "another model"))
        if not number:
            results.append(refused(lambda cache=cache, wrong=wrong: wrong(tokens(4), past_key_values=cache), "another model"))
    return results[0][0], all(right for _, right in results)


@fault("5a", "one row of 30 tokens in a batch with one of 400, at 10%; live, too")
def _(folder: Path) -> tuple[str, bool]:
    import torch

    from keepkv import KeepCache

    model, _ = tiny()
    mask = torch.ones(2, 400, dtype=torch.int64)
    mask[1, :370] = 0
    shown, right = [], True
    for more in ({}, {"period": 32}):
        cache = KeepCache(model, "10%", "snapkv", slot_dtype="float", **more)
        cache.read(model, tokens(400, 2), mask)
        report = cache.report()
        shown.append(f"{report.kv_bytes} of {report.kv_bytes_full} bytes, note {report.note[:40]!r}")
        right = right and report.kv_bytes < 0.3 * report.kv_bytes_full and "fewer than" in report.note
    return "; ".join(shown), right


@fault("5b", "a text of 26 tokens at 10%, a count of 2, and budgets 0 and 1 in a chat")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv import KeepCache
    from keepkv.cli.chat import Chat
    from keepkv.text.conversation import Conversation

    model, tokenizer = tiny()
    cache = KeepCache(model, "10%", "snapkv", slot_dtype="float").read(model, tokens(26))
    note = cache.report().note
    results = [refused(lambda: KeepCache(model, 2, "snapkv").read(model, tokens(26)), "must be kept")]
    talk = Conversation(model, tokenizer)
    talk.say("Hello, this is a line of some length. " * 3, max_new_tokens=3)
    chat = Chat(lambda: talk, 4, 0.0)
    for budget in ("0", "1", "0%"):
        results.append(refused(lambda budget=budget: chat._take(f"/budget {budget}")))
    return f"{note[:70]!r}; {results[1][0]}", "fewer than" in note and all(right for _, right in results)


@fault("6", "several passes into a cache that is not live (generate with prefill_chunk_size)")
def _(folder: Path) -> tuple[str, bool]:
    import warnings

    from keepkv import KeepCache

    model, _ = tiny()
    cache = KeepCache(model, 20, "snapkv")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.generate(tokens(402), past_key_values=cache, max_new_tokens=2, do_sample=False, prefill_chunk_size=64)
    told = [str(each.message) for each in said if "chunk" in str(each.message)]
    return f"tokens {cache.report().tokens}; warned: {told[:1]}", bool(told)


@fault("7", "weights on the meta device, and in float8, for a method that needs the output projection")
def _(folder: Path) -> tuple[str, bool]:
    import torch

    from keepkv.models.families import projections

    model, _ = tiny()
    for index, dtype in enumerate((torch.float8_e4m3fn, None)):
        projection = model.model.layers[index].self_attn.o_proj
        weight = projection.weight.data.to("meta") if dtype is None else projection.weight.data.to(dtype)
        projection.weight = torch.nn.Parameter(weight, requires_grad=False)
    found = projections(model)
    return f"{[None if each is None else each.dtype for each in found]}", found == [None, None]


@fault("8", "prompt lookup and assisted generation after cache.read(...)")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv import KeepCache

    model, _ = tiny()
    results = []
    for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny()[0]}):
        cache = KeepCache(model, "50%", "snapkv", tail=8)
        cache.read(model, tokens(122))
        ask = {"past_key_values": cache, "max_new_tokens": 4, "do_sample": False, **more}
        results.append(refused(lambda ask=ask: model.generate(tokens(123), **ask), "assisted generation"))
    return results[0][0], all(right for _, right in results)


@fault("9", "keys and values that are huge, constant, repeated, zero: every method and format")
def _(folder: Path) -> tuple[str, bool]:
    import torch

    from keepkv import KeepCache, methods
    from keepkv.errors import KeepKVError
    from keepkv.slots.slot_dtype import SLOT_DTYPES

    model, _ = tiny()
    wrong: dict[str, int] = {}
    tried = 0
    plain = tokens(60)
    inputs = {"one token": torch.full((1, 60), 7), "two tokens": torch.tensor([[7, 9] * 30]), "plain": plain}
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    scales = {"zero": 0.0, "tiny": 1e-20, "as it is": 1.0, "large": 1e15, "huge": 1e20}
    for name in methods.METHODS:
        for slot_dtype in ("auto", *SLOT_DTYPES):
            for what, scale in scales.items():
                if slot_dtype != "auto" and what not in ("zero", "huge"):
                    continue
                for ids in inputs.values() if slot_dtype == "auto" else (plain,):
                    model.load_state_dict(state)
                    for layer in model.model.layers:
                        layer.self_attn.k_proj.weight.data *= scale
                        layer.self_attn.v_proj.weight.data *= scale
                    tried += 1
                    try:
                        cache = KeepCache(model, "30%", name, slot_dtype=slot_dtype, check=False)
                        cache.read(model, ids)
                        logits = model(tokens(3), past_key_values=cache).logits
                        if not bool(logits.isfinite().all()):
                            raise ArithmeticError("the answer is no number")
                    except KeepKVError:
                        pass
                    except Exception as error:
                        key = f"{type(error).__name__} {str(error)[:40]} ({name}, {slot_dtype}, {what})"
                        wrong[key] = wrong.get(key, 0) + 1
    return f"{tried} tried, {sum(wrong.values())} wrong: {list(wrong.items())[:4]}", not wrong


@fault("e1", "copy.deepcopy, pickle and torch.save of a cache; budgets as numbers of NumPy and torch, and '1e3'")
def _(folder: Path) -> tuple[str, bool]:
    import copy
    import pickle

    import numpy as np
    import torch

    from keepkv import KeepCache

    model, _ = tiny()
    cache = KeepCache(model, np.float32(0.25), "snapkv")
    for budget in (np.int64(8), torch.tensor(0.5), "1e3"):
        KeepCache(model, budget)
    model(tokens(60), past_key_values=cache)
    twin = copy.deepcopy(cache)
    shared = twin._projections[0].data_ptr() == cache._projections[0].data_ptr()
    result, right = refused(lambda: pickle.dumps(cache), "save()")
    _, right2 = refused(lambda: torch.save(cache, folder / "x"), "save()")
    return f"deepcopy shares: {shared}; {result}", shared and right and right2


@fault("e2", "a cache that was read in inference mode, used outside it")
def _(folder: Path) -> tuple[str, bool]:
    import torch

    from keepkv import KeepCache

    model, _ = tiny()
    cache = KeepCache(model, "30%", "keepkv", period=32)
    with torch.inference_mode():
        cache.read(model, tokens(100))
    plain = model(tokens(5), past_key_values=cache.fork()).logits
    with torch.enable_grad():
        graded = model(tokens(5), past_key_values=cache.fork()).logits
        model(tokens(50), past_key_values=cache)
    near = torch.allclose(plain, graded, atol=1e-5)
    return f"the same logits: {near}, {lengths(cache)} tokens", near


@fault("e3", "an empty input")
def _(folder: Path) -> tuple[str, bool]:
    from keepkv import KeepCache

    model, _ = tiny()
    return refused(lambda: KeepCache(model, 20).read(model, tokens(0)), "empty")


class Serving:
    """`keepkv serve` in a process of its own, with the tiny model."""

    def __init__(self, folder: Path, *options: str) -> None:
        import socket

        model, tokenizer = tiny()
        model.config.max_position_embeddings = 10**6
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "keepkv", "serve", str(folder / "model"), "--port", str(self.port), *options]
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self.name = str(folder / "model")

    def __enter__(self) -> Serving:
        end = time.monotonic() + 90
        while self.ask(None, "/health")[0] != 200:
            if time.monotonic() > end or self.process.poll() is not None:
                raise TimeoutError("the server does not start")
            time.sleep(0.1)
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()

    def ask(
        self, body: object, route: str = "/v1/chat/completions", timeout: float = 60, **headers: str
    ) -> tuple[int, str, float]:
        """Status, answer and seconds. Status 0: no answer."""
        import urllib.error
        import urllib.request

        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}{route}"
        request = urllib.request.Request(url, data, {"content-type": "application/json", **headers})
        start = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        except OSError as error:
            status, text = 0, str(error)
        return status, text, time.monotonic() - start

    def said(self, text: str, **more: object) -> tuple[str, float]:
        status, answer, seconds = self.ask(
            {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 16, "model": self.name, **more}
        )
        return json.loads(answer)["choices"][0]["message"]["content"] if status == 200 else answer, seconds


@fault("serve1", "keepkv serve: 20 pairs of answers, with another client's longer and shorter prompts before, and without")
def _(folder: Path) -> tuple[str, bool]:
    import random
    import statistics

    with Serving(folder, "--budget", "10%") as server:
        alike, alone, after = 0, [], []
        for number in range(20):
            rng = random.Random(number)
            text = "".join(rng.choice("abcdefgh ") for _ in range(2500))
            first, seconds = server.said(text)
            alone.append(seconds)
            server.said(text[:2000])
            server.said(text[:2300], cache_salt="other")
            second, seconds = server.said(text)
            after.append(seconds)
            alike += first == second
    medians = statistics.median(alone), statistics.median(after)
    near = abs(medians[0] - medians[1]) < 0.25 * medians[0]
    return f"{alike} of 20 alike, medians {medians[0] * 1000:.0f} and {medians[1] * 1000:.0f} ms", alike == 20 and near


@fault("serve2", "keepkv serve: a message of 30 MB, and health meanwhile; then SIGTERM")
def _(folder: Path) -> tuple[str, bool]:
    import threading

    with Serving(folder) as server:
        body = json.dumps({"messages": [{"role": "user", "content": "whale " * 5_000_000}]}).encode()
        big: list[tuple[int, str, float]] = []
        thread = threading.Thread(target=lambda: big.append(server.ask(body)))
        thread.start()
        health = max(server.ask(None, "/health", timeout=30)[2] for _ in range(20))
        thread.join()
        answered = server.said("Hello")[0]
        server.process.terminate()
        start = time.monotonic()
        server.process.wait(30)
        ended = time.monotonic() - start
    status = big[0][0]
    return f"status {status}, health within {health:.2f} s, ended after {ended:.1f} s", status in (
        0,
        413,
    ) and health < 2 and bool(answered)


@fault("serve3", "keepkv serve: a client leaves while it is answered, streamed or not, and the next one asks")
def _(folder: Path) -> tuple[str, bool]:
    import socket

    with Serving(folder) as server:
        quick = server.said("Hello", max_tokens=2)[1]
        waits = []
        for stream in (False, True):
            more = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 8000, "stream": stream}
            data = json.dumps(more).encode()
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
                time.sleep(1.5)
            waits.append(server.said("Hello", max_tokens=2)[1])
    return f"{quick:.1f} s alone; {waits[0]:.1f} and {waits[1]:.1f} s after one that left", max(waits) < quick + 3


@fault("serve4", "keepkv serve: empty messages, max_tokens 0, wrong types, half a surrogate pair, another host, /reset")
def _(folder: Path) -> tuple[str, bool]:
    with Serving(folder) as server:
        user = {"role": "user", "content": "x"}
        bodies: list[Any] = [
            {"messages": []}, {"messages": [user], "max_tokens": 0}, {"messages": "x"},
            {"messages": [user], "temperature": "x"},
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"{", [],
        ]  # fmt: skip
        statuses = [server.ask(body)[0] for body in bodies]
        host = server.ask(None, "/health", Host="evil.example")[0]
        reset = server.ask({}, "/reset")[0]
        server.log.seek(0)
        quiet = "Traceback" not in server.log.read()
    right = statuses == [400] * len(bodies) and host == 403 and reset in (404, 405) and quiet
    return f"{statuses}, another host {host}, /reset {reset}, {'no' if quiet else 'a'} stack trace in the log", right


@fault("serve5", "keepkv serve: 50 clients at once, half of which leave")
def _(folder: Path) -> tuple[str, bool]:
    from concurrent.futures import ThreadPoolExecutor

    with Serving(folder, "--max-waiting", "20") as server:
        bodies = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 30}
        with ThreadPoolExecutor(50) as pool:
            asked = [pool.submit(server.ask, bodies, timeout=0.5 if number % 2 else 100) for number in range(50)]
            health = max(server.ask(None, "/health", timeout=30)[2] for _ in range(10))
            statuses = [each.result()[0] for each in asked]
        time.sleep(1)
        left = json.loads(server.ask(None, "/health")[1])["waiting"]
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    right = set(counts) <= {0, 200, 503} and counts.get(200, 0) >= 10 and health < 2 and left == 0
    return f"statuses {counts} (0: left), health within {health:.2f} s, {left} left in the queue", right


def tried(number: str) -> tuple[str, bool]:
    """What comes of a fault, tried in a process of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [sys.executable, str(HERE), "--one", number, folder]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        except subprocess.TimeoutExpired:
            return f"no end after {PATIENCE} seconds", False
        finally:
            subprocess.run(["umount", "-ql", folder], check=False, capture_output=True)
    lines = ran.stdout.strip().splitlines()
    if ran.returncode < 0:
        return f"killed by {signal.Signals(-ran.returncode).name}", False
    if ran.returncode or not lines:
        return f"ends with {(ran.stderr.strip().splitlines() or ['nothing'])[-1][:150]}", False
    result, right = json.loads(lines[-1])
    return result, right


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        import torch

        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        print(json.dumps(FAULTS[sys.argv[2]].attempt(Path(sys.argv[3]))))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    wanted = sys.argv[1:]
    wrong = 0
    for number, each in FAULTS.items():
        if not wanted or any(number.startswith(name) and not number[len(name) :][:1].isdecimal() for name in wanted):
            result, right = tried(number)
            wrong += not right
            print(f"{number:>8}  {'right' if right else 'WRONG'}  {each.tried}\n                 {result}", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
