"""The store: found by what it is, bounded, shared by processes, and whole whenever one of them is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from documents.store_worker import work
from helpers import FOX, make_model
from keepkv.documents.document import Recipe
from keepkv.documents.store import Shelf, Store
from keepkv.errors import InputError

TEXT = FOX
RECIPE = Recipe("20%", "snapkv")


def test_the_same_text_model_and_recipe_are_compiled_once(shelf: Shelf) -> None:
    entry, new = shelf.add(TEXT, RECIPE, "fox")
    assert new
    again, new = shelf.add(TEXT, RECIPE, "fox")
    assert (again.key, new) == (entry.key, False)
    others = [
        shelf.add(TEXT + "!", RECIPE)[0],
        shelf.add(TEXT, Recipe("0.2", "tova"))[0],
        shelf.add(TEXT, Recipe("30%", "snapkv"))[0],
    ]
    assert len({entry.key, *(other.key for other in others)}) == 4
    document = shelf.get(entry.key)
    assert document is not None
    assert document.tokens == entry.tokens
    assert shelf.get("0" * 64) is None


def test_another_model_does_not_find_it(shelf: Shelf, model_and_tokenizer) -> None:
    _, tokenizer = model_and_tokenizer
    entry, _ = shelf.add(TEXT, RECIPE)
    other = shelf.store.for_model(
        make_model("llama", torch.float32, seed=5, vocab_size=256, max_position_embeddings=4096), tokenizer
    )
    assert other.longest(torch.tensor([[1, 2, 3]])) is None
    assert other.add(TEXT, RECIPE)[0].key != entry.key


def test_find_list_and_remove(shelf: Shelf) -> None:
    entry, _ = shelf.add(TEXT, RECIPE, "fox.txt")
    other, _ = shelf.add(TEXT, Recipe("30%", "snapkv"), "fox.txt")
    assert shelf.store.find(entry.key[:10]).key == entry.key
    with pytest.raises(InputError, match="several entries"):
        shelf.store.find("fox.txt")
    shelf.store.remove(other.key)
    assert shelf.store.find("fox.txt").key == entry.key
    assert [each.key for each in shelf.store.entries()] == [entry.key]
    with pytest.raises(InputError, match="holds no"):
        shelf.store.find("hen.txt")


def test_the_least_recently_used_go_first(shelf: Shelf) -> None:
    keys = [shelf.add(f"{n} {TEXT}", RECIPE)[0].key for n in range(4)]
    shelf.get(keys[0])
    size = max(entry.bytes for entry in shelf.store.entries())
    gone, _ = shelf.store.collect(2.5 * size)
    assert {entry.key for entry in gone} == {keys[1], keys[2]}
    shelf.limit = 2.5 * size
    shelf.add(f"more {TEXT}", RECIPE)
    assert len(shelf.store.entries()) == 2
    assert shelf.get(keys[0]) is not None


def test_order_is_restored_from_the_files(shelf: Shelf) -> None:
    kept, lost = (shelf.add(f"{n} {TEXT}", RECIPE)[0] for n in range(2))
    lost.file.unlink()
    stale, new = (shelf.store.folder / f".{name}.tmp" for name in ("stale", "new"))
    for file in (stale, new):
        file.write_text("half")
    os.utime(stale, (0, 0))
    shelf.store.close()
    for file in shelf.store.folder.glob("index.sqlite3*"):
        file.unlink()
    with Store(shelf.store.folder) as again:
        assert [entry.key for entry in again.entries()] == [kept.key]
        assert again.collect() == ([], 0)
        assert again.find(kept.key).tokens == kept.tokens
    assert new.exists()
    assert not stale.exists()


def test_a_file_that_is_not_understood_is_not_adopted_and_not_deleted(shelf: Shelf) -> None:
    entry, _ = shelf.add(TEXT, RECIPE)
    newer = shelf.store.folder / f"{'f' * 64}.keep"
    save_file({"x": torch.zeros(1)}, newer, {"keepkv": json.dumps({"format": 99})})
    assert shelf.store.collect() == ([], 0)
    assert newer.exists()
    assert [each.key for each in shelf.store.entries()] == [entry.key]


def test_the_longest_prefix_is_found_and_is_exact(shelf: Shelf) -> None:
    text = TEXT * 3
    compact, _ = shelf.add(text, RECIPE)
    document = shelf.get(compact.key)
    assert document is not None
    prompt = torch.cat([document.ids, document.question(shelf.tokenizer, "Who?")], 1)
    found = shelf.longest(prompt)
    assert found is not None
    assert found[1] == document.tokens
    assert shelf.longest(document.ids[:, :100]) is None  # a compact part is used whole

    whole, _ = shelf.add(text, Recipe("100%", "full"))
    for length in (100, document.tokens - 1):
        found = shelf.longest(torch.cat([document.ids[:, :length], torch.full((1, 9), 3)], 1))
        assert found is not None
        part, same = found
        assert same == part.tokens == part.cache.get_seq_length() == part.ids.shape[1] == length
        ours = shelf.model(torch.full((1, 9), 3), past_key_values=part.cache).logits
        theirs = shelf.model(torch.cat([document.ids[:, :length], torch.full((1, 9), 3)], 1)).logits[:, length:]
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert shelf.get(whole.key).tokens == document.tokens  # what is shared is not changed
    assert shelf.longest(torch.full((1, 50), 3)) is None
    assert shelf.longest(prompt, Recipe("100%", "full"))[0].recipe.method == "full"
    assert shelf.longest(prompt, Recipe("5%", "snapkv")) is None


def test_a_document_that_was_read_on_is_another_entry(shelf: Shelf) -> None:
    from dataclasses import replace

    document = shelf.ask_for(TEXT, RECIPE)
    more = torch.full((1, 7), 5)
    cache = document.cache.fork()
    shelf.model(more, past_key_values=cache)
    shelf.put(replace(document, cache=cache, ids=torch.cat([document.ids, more], 1)))
    found = shelf.longest(torch.cat([document.ids, more[:, :4], torch.full((1, 2), 9)], 1))
    assert found is not None
    assert found[1] == document.tokens + 4


CHILD = """
import sys
from keepkv.models import loading
from keepkv.documents.document import Recipe
from keepkv.documents.store import Store
model, tokenizer = loading.load(sys.argv[1])
shelf = Store(__import__("pathlib").Path(sys.argv[2])).for_model(model, tokenizer, "tiny")
print("ready", flush=True)
for n in range(1000):
    entry, new = shelf.add(f"{sys.argv[3]} {n} " + "The quick brown fox. " * 3, Recipe("40%", "snapkv"))
    print(entry.key, flush=True)
    if n % 5 == 4:
        shelf.store.remove(shelf.store.entries()[-1].key)
        shelf.store.collect(10**9)
"""


def test_killing_it_loses_nothing_that_was_finished(folder: str, model_and_tokenizer, tmp_path: Path) -> None:
    rng = random.Random(0)
    for number in range(3):
        command = [sys.executable, "-c", CHILD, folder, str(tmp_path), str(number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.1, 0.6))
            child.send_signal(signal.SIGKILL)
            finished = child.stdout.read().split()
        with Store(tmp_path) as store:
            store.collect()
            keys = {entry.key for entry in store.entries()}
            removed = len(finished) // 5  # the least recently used one of all, at most, each time
            assert len(set(finished) - keys) <= removed
            shelf = store.for_model(*model_and_tokenizer)
            for entry in store.entries():
                document = shelf.get(entry.key)
                assert document is not None
                assert document.cache.report().method == "snapkv"


def test_several_processes_at_once(folder: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    failed = context.Queue()
    workers = [context.Process(target=work, args=(folder, str(tmp_path), seed, 4.0, failed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failed.empty(), failed.get()
    assert all(worker.exitcode == 0 for worker in workers)


def test_a_damaged_index_is_made_again_from_the_files(shelf: Shelf) -> None:
    keys = {shelf.add(f"{n} {TEXT}", RECIPE)[0].key for n in range(2)}
    shelf.store.close()
    file = shelf.store.folder / "index.sqlite3"
    whole = file.read_bytes()
    with sqlite3.connect(file) as index:
        index.execute("UPDATE entries SET key = '../../' || key, tokens = 'many'")
    index.close()
    forged = file.read_bytes()
    for data in (b"no database at all" * 99, whole[:5000], whole[:100], b"", whole.replace(b"prefixes", b"profixes"), forged):
        for suffix in ("-wal", "-shm"):
            file.with_name(file.name + suffix).unlink(missing_ok=True)
        file.write_bytes(data)
        with Store(shelf.store.folder) as again:
            assert {entry.key for entry in again.entries()} == keys
            assert not again.read_only


def test_a_store_that_cannot_be_written_can_be_read(shelf: Shelf, monkeypatch) -> None:
    entry, _ = shelf.add(TEXT, RECIPE)
    shelf.store.close()

    def readonly(*_: object) -> None:
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr("keepkv.documents.index._connected", readonly)
    for damage in (False, True):  # of an index that cannot be read either, one is made in memory
        if damage:
            (shelf.store.folder / "index.sqlite3").write_bytes(b"damaged")
        with Store(shelf.store.folder) as store:
            assert store.read_only
            again = store.for_model(shelf.model, shelf.tokenizer)
            assert [each.key for each in store.entries()] == [entry.key]
            assert again.get(entry.key) is not None
            assert not again.add(TEXT, RECIPE)[1]
            with pytest.raises(InputError, match="only be read"):
                store.collect()


def test_a_full_disk_is_said_and_costs_nothing_that_is_there(shelf: Shelf, monkeypatch) -> None:
    entry, _ = shelf.add(TEXT, RECIPE)

    class Full:
        def cursor(self) -> object:
            raise sqlite3.OperationalError("database or disk is full")

        def execute(self, *arguments: object) -> object:
            return index.execute(*arguments)

        def close(self) -> None:
            index.close()

    index, shelf.store._index = shelf.store._index, Full()
    assert shelf.get(entry.key) is not None
    with pytest.raises(InputError, match="is full"):
        shelf.store.remove("f" * 64)
    shelf.store._index = index


def test_a_damaged_entry_is_made_again(shelf: Shelf) -> None:
    entry, _ = shelf.add(TEXT, RECIPE)
    whole = entry.file.read_bytes()
    for way in (lambda: shelf.add(TEXT, RECIPE)[1], lambda: shelf.ask_for(TEXT, RECIPE).tokens > 0):
        entry.file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert way()
        assert shelf.get(entry.key) is not None


def test_two_models_in_one_store_do_not_meet(shelf: Shelf) -> None:
    whole = replace(RECIPE, budget="100%", method="full")
    entry, _ = shelf.add(TEXT, whole)
    ids = shelf.get(entry.key).ids
    other = shelf.store.for_model(
        make_model("llama", seed=1, vocab_size=256, max_position_embeddings=4096).float(), shelf.tokenizer
    )
    assert other.longest(ids) is None
    other.add(TEXT, whole)
    for each in (shelf, other):
        document, shared = each.longest(ids)
        assert shared == ids.shape[1] - 1
        assert document.cache.keep_layers[0].tail == shared


def test_only_their_owner_reads_documents(shelf: Shelf) -> None:
    entry, _ = shelf.add(TEXT, RECIPE)
    with Store(shelf.store.folder / "new") as made:
        assert made.folder.stat().st_mode & 0o077 == 0
    assert entry.file.stat().st_mode & 0o077 == 0
