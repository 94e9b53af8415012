"""What is saved comes back: everything that a cache reports, what documents are compared by, and what joined ones report."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from helpers import FOX, make_model, tokens
from keepkv import KeepCache, Recipe, Report
from keepkv.documents.batch import Compiler, Order
from keepkv.documents.document import Document, compile_text, load, save, shortened
from keepkv.documents.format import Contents, write
from keepkv.documents.joining.join import join
from keepkv.documents.joining.joined import joined
from keepkv.documents.packing import pack, unpack
from keepkv.documents.store import Store
from keepkv.errors import InputError

HELD = {"kv_bytes", "watch_bytes", "backing_bytes"}  # what is held is counted anew: queries and backing are not saved
SAVED = {
    "plain": {},
    "uncompressed": {"auto": False},
    "whole": {"budget": "100%"},
    "int8": {"slot_dtype": "int8"},
    "int4": {"slot_dtype": "int4"},
    "eviction": {"method": "snapkv"},
    "repeated": {"method": "kvzip"},
    "live": {"period": 16},
    "live with a tail": {"period": 16, "tail": 4},
    "chunks": {"chunk": 25, "budget": "10"},
    "backing": {"period": 16, "backing": "cpu"},
}


def through_a_file(cache: KeepCache, model, file: Path) -> KeepCache:
    write(file, *pack(cache))
    return unpack(Contents(file), model, model.device)


@pytest.mark.parametrize("name", SAVED)
def test_a_loaded_cache_reports_what_the_saved_one_did(name: str, tmp_path: Path) -> None:
    model = make_model("llama", torch.float32)
    cache = KeepCache(model, **{"budget": 0.4, **SAVED[name]})
    cache.read(model, tokens(1, 60))
    model(tokens(1, 5, seed=1), past_key_values=cache)
    before = cache.report()
    after = through_a_file(cache, model, tmp_path / "a.keep").report()
    for field in fields(Report):
        if field.name not in HELD:
            assert getattr(after, field.name) == getattr(before, field.name), field.name
    assert after.kv_bytes <= before.kv_bytes
    assert before.repeat_seconds > 0 or name != "repeated"


def test_a_fork_has_everything_that_the_cache_has() -> None:
    model = make_model("llama", torch.float32)
    cache = KeepCache(model, 0.5, period=16, tail=3, seed=7, references=99, backing="cpu", refresh=40)
    cache.read(model, tokens(1, 60), keep=[(3, 9)])
    twin = cache.fork()
    assert vars(twin).keys() == vars(cache).keys()
    assert all(value is vars(cache)[name] for name, value in vars(twin).items() if name != "layers")
    assert twin.policy.spans == ((3, 9),)
    assert twin.report() == cache.report()
    model(tokens(1, 20, seed=2), past_key_values=twin)
    assert twin.get_seq_length() == 80
    assert cache.get_seq_length() == 60


def test_a_loaded_cache_is_not_live_and_says_so(tmp_path: Path) -> None:
    """Settings are not saved with a cache: they decide about tokens that come later, and those stay exact."""
    model = make_model("llama", torch.float32)
    cache = KeepCache(model, 0.4, period=16, seed=3)
    model(tokens(1, 60), past_key_values=cache)
    loaded = through_a_file(cache, model, tmp_path / "a.keep")
    assert not loaded.live
    assert "live=False" in repr(loaded)
    model(tokens(1, 40, seed=1), past_key_values=loaded)
    assert loaded.report().tail == 40


@pytest.mark.parametrize("padding", [0, 4])
def test_reading_on_behind_a_compressed_prompt_hides_no_token(padding: int, tmp_path: Path) -> None:
    model = make_model("llama", torch.float32)
    cache = KeepCache(model, 0.4, "snapkv")
    mask = torch.ones(1, 60, dtype=torch.int64)
    mask[:, :padding] = 0
    cache.read(model, tokens(1, 60), mask)
    caches = [cache, cache.fork()]
    if not padding:
        caches.append(through_a_file(cache, model, tmp_path / "a.keep"))
    steps = [tokens(1, length, seed=length) for length in (5, 4, 3)]
    wanted = []
    for number, ids in enumerate(steps):
        columns = cache.get_seq_length() + ids.shape[1]
        visible = torch.ones(1, columns, dtype=torch.int64)
        visible[:, :padding] = 0
        positions = torch.arange(columns - ids.shape[1], columns)[None] - padding
        output = model(ids, past_key_values=caches[0], attention_mask=visible, position_ids=positions)
        wanted.append(output.logits[:, -1])
        for other in caches[1:]:
            if number < 2:
                other.read(model, ids)
            else:
                last = model(ids, past_key_values=other, attention_mask=visible, position_ids=positions).logits[:, -1]
                torch.testing.assert_close(last, wanted[-1], atol=1e-4, rtol=1e-4)
    assert all(other.report().tail == 12 for other in caches)


def test_a_padded_row_is_not_saved() -> None:
    model = make_model("llama", torch.float32)
    cache = KeepCache(model, 0.4, "snapkv")
    mask = torch.ones(1, 60, dtype=torch.int64)
    mask[:, :4] = 0
    cache.read(model, tokens(1, 60), mask)
    with pytest.raises(InputError, match="without padding"):
        pack(cache)


def test_joined_caches_report_the_seconds_of_their_parts() -> None:
    model = make_model("llama", torch.float32)
    parts = []
    for seed in range(2):
        cache = KeepCache(model, 0.4, "kvzip", slot_dtype="float")
        parts.append(cache.read(model, tokens(1, 40, seed=seed)))
    report = join(model, parts, [0, 0]).report()
    ours = [part.report() for part in parts]
    assert report.repeat_seconds == sum(part.repeat_seconds for part in ours) > 0
    assert report.compress_seconds == sum(part.compress_seconds for part in ours)
    assert report.longest_pause == max(part.longest_pause for part in ours)
    assert report.compressions == 2
    assert report.note == "2 joined"
    alone = join(model, parts[:1], [0]).report()
    assert replace(alone, kv_bytes=0, tail=0) == replace(ours[0], kv_bytes=0, tail=0)


def test_a_recipe_in_numbers_is_the_recipe_that_was_saved(folder: str, tmp_path: Path) -> None:
    """Files have budgets in words: 0.25 and "0.25" are one recipe to --resume and to the store."""
    recipe = Recipe(0.25, "snapkv")
    (tmp_path / "fox.txt").write_text(FOX)
    compiler = Compiler(Order(recipe, resume=True, model=folder))
    facts = [compiler.compile(str(tmp_path / "fox.txt"), tmp_path / "fox.keep") for _ in range(2)]
    assert [each["made"] for each in facts] == [True, False]
    shelf = Store(tmp_path / "store").for_model(compiler.model, compiler.tokenizer)
    shelf.add(FOX, recipe)
    document = shelf.ask_for(FOX, recipe)
    later = torch.cat([document.ids, document.ids[:, :3]], 1)
    for wanted in (None, recipe, document.recipe):
        document, same = shelf.longest(later, wanted)
        assert same == document.tokens
    assert shelf.longest(later, Recipe(0.3, "snapkv")) is None


def test_a_document_comes_back_with_every_field(compiled, model_and_tokenizer, tmp_path: Path) -> None:
    document, _ = compiled
    save(document, tmp_path / "again.keep", *model_and_tokenizer)
    again = load(tmp_path / "again.keep", *model_and_tokenizer)
    tensors = {"cache", "ids", "exact"}
    for field in fields(Document):
        if field.name not in tensors:
            assert getattr(again, field.name) == getattr(document, field.name), field.name
    assert torch.equal(again.ids, document.ids)
    assert again.cache.report().heads == document.cache.report().heads


def test_a_shortened_document_has_the_exact_keys_of_its_own_tokens(model_and_tokenizer, tmp_path: Path) -> None:
    document = compile_text(*model_and_tokenizer, FOX, Recipe(method="full", exact=True))
    short = shortened(document, 40)
    assert short.tokens == short.ids.shape[1] == 40
    for index in range(3):
        for ours, theirs in zip(short.exact(index), document.exact(index), strict=True):
            assert torch.equal(ours, theirs[:, :, :40])
    save(short, tmp_path / "short.keep", *model_and_tokenizer)
    again = load(tmp_path / "short.keep", *model_and_tokenizer)
    assert again.exact(0)[0].shape[2] == again.tokens == 40
    model, _ = model_and_tokenizer
    both = joined(model, [document, short], repair=0.5)
    assert both.tokens == document.tokens + 40 - document.lead
    assert all(layer.seen == both.tokens for layer in both.cache.layers)
    assert both.reading_seconds == 2 * document.reading_seconds


def test_a_file_without_exact_keys_does_not_promise_them(compiled, model_and_tokenizer, tmp_path: Path) -> None:
    document, file = compiled
    assert load(file, *model_and_tokenizer).recipe.exact
    save(replace(document, exact=None), tmp_path / "without.keep", *model_and_tokenizer)
    assert load(tmp_path / "without.keep", *model_and_tokenizer).recipe == replace(document.recipe, exact=False)
