"""Looking back: the spans that a question looks for come back, for this question only."""

from __future__ import annotations

import sys
from itertools import permutations

import pytest
import torch
from torch import Tensor

from helpers import make_model, randn, tokens
from keepkv import InputError, KeepCache, KeepKVError, Recipe
from keepkv.cache.index import Index
from keepkv.lookback import look_back as module
from keepkv.lookback.bring_back import exact
from keepkv.lookback.bring_back import tokens as again
from keepkv.lookback.copying_heads import copying_heads
from keepkv.lookback.look_back import allowance, indexed, look_back
from keepkv.lookback.rank import best_spans, looks, peaks
from keepkv.lookback.words import Words

LENGTH = 500


@pytest.fixture(autouse=True)
def _random_models_look_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLAT", 0.0)


def compact(family: str = "llama", dtype: torch.dtype = torch.float32, **options) -> tuple[KeepCache, KeepCache]:
    """A cache of 500 tokens, whole and compressed."""
    model = make_model(family, dtype)
    whole = KeepCache(model, auto=False)
    whole.index = Index.by(copying_heads(model))
    model(tokens(1, LENGTH), past_key_values=whole)
    return whole, whole.fork().compress("10%", "snapkv", **options)


def state(cache: KeepCache) -> list[Tensor]:
    held = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, Tensor)]
    return [*held, *(x for layer in cache.keep_layers for x in layer.slots.tensors)]


def write(model, cache: KeepCache, question: Tensor, count: int = 8) -> list[int]:
    logits = model(question, past_key_values=cache).logits
    words: list[int] = []
    for _ in range(count):
        words.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([words[-1:]]), past_key_values=cache).logits
    return words


def test_six_questions_in_any_order_get_the_same_answers_and_nothing_changes(family: str) -> None:
    model = make_model(family, torch.float32)
    _, cache = compact(family)
    source = again(model, tokens(1, LENGTH))
    before = [x.clone() for x in state(cache)]
    questions = [tokens(1, 5 + seed, seed=seed) for seed in range(1, 7)]
    answers: dict[int, list] = {}
    for order in list(permutations(range(6)))[::313]:
        for number in order:
            fork, sources = look_back(model, cache, questions[number], source, 128)
            found = [sources.spans, write(model, fork, questions[number])]
            assert answers.setdefault(number, found) == found
    assert all(torch.equal(a, b) for a, b in zip(before, state(cache), strict=True))
    assert len({str(answer) for answer in answers.values()}) > 1


def test_with_room_for_everything_it_is_the_full_cache(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepkv.lookback.rank.NEAR", 0.0)
    model = make_model(family, torch.float32)
    whole, cache = compact(family)
    question = tokens(1, 9, seed=1)
    fork, sources = look_back(model, cache, question, exact(whole), LENGTH)
    assert sources.spans == ((0, LENGTH),)
    assert sources.tokens == LENGTH
    expected = model(question, past_key_values=whole).logits
    torch.testing.assert_close(model(question, past_key_values=fork).logits, expected, rtol=0, atol=1e-4)


def test_what_it_took_is_said() -> None:
    model = make_model("llama", torch.float32)
    whole, cache = compact(slot_dtype="float")
    fork, sources = look_back(model, cache, tokens(1, 9), exact(whole), 128, by_words=[2])
    assert sources.ranked_by == ("index", "words")
    per_token = sum(2 * layer.heads * 16 * 4 for layer in cache.keep_layers)
    gone = sum(len(cache.keep_layers[i].slots.bias) - len(fork.keep_layers[i].slots.bias) for i in range(3))
    assert sources.bytes == sources.tokens * per_token - gone * (2 * 16 * 4 + 8)
    assert sources.index_bytes == cache.index.bytes > 0
    assert sources.to_dict()["spans"] == [list(span) for span in sources.spans]


def test_a_question_that_looks_nowhere_brings_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", torch.float32)
    whole, cache = compact()
    monkeypatch.setattr(module, "FLAT", 1.0)
    question = tokens(1, 9)
    fork, sources = look_back(model, cache, question, exact(whole), 256, by_words=[2])
    assert (sources.spans, sources.bytes) == ((), 0)
    assert write(model, fork, question) == write(model, cache.fork(), question)


def test_the_question_is_read_over_the_compact_cache() -> None:
    """Every head's shares are those of the queries that the question really has there."""
    model = make_model()
    _, cache = compact(dtype=torch.float64)
    question = tokens(1, 9, seed=1)
    heads = cache.index.heads
    logged: dict[int, Tensor] = {}
    handles = [
        layer.self_attn.q_proj.register_forward_hook(lambda _, __, out, i=i: logged.__setitem__(i, out))
        for i, layer in enumerate(model.model.layers)
    ]
    twin = cache.fork()
    model(question, past_key_values=twin)
    for handle in handles:
        handle.remove()
    shares = []
    for number, head in enumerate(heads):
        flat = logged[head.layer].view(9, 4, 16)[:, head.head * 2 + head.query]
        cos, sin = model.model.rotary_emb(flat, torch.arange(LENGTH, LENGTH + 9)[None])
        turned = torch.cat([-flat[:, 8:], flat[:, :8]], 1)
        query = (flat * cos[0] + turned * sin[0]) / 4
        keys = torch.cat([*cache.index.keys(number), twin.keep_layers[head.layer].keys[0, head.head]])
        logits = query @ keys.T
        for row in range(9):
            logits[row, LENGTH + row + 1 :] = -torch.inf
        shares.append(logits.softmax(-1)[:, :LENGTH].amax(0))
    expected = torch.stack(shares).mean(0)
    found = looks(model, cache, question)
    assert found.spans == best_spans(expected, 4).spans
    assert found.peak == pytest.approx(float(expected[4:].max()), rel=1e-4)


def test_a_question_longer_than_the_bank_of_queries_is_heard_whole() -> None:
    model = make_model("llama", torch.float32)
    _, cache = compact()
    cache.recipe = Recipe(references=4)
    short = looks(model, cache, tokens(1, 300, seed=1))
    cache.recipe = Recipe()
    assert looks(model, cache, tokens(1, 300, seed=1)) == short


def test_shares_are_the_largest_of_the_causal_softmax() -> None:
    queries, keys, newer = randn(2, 4), randn(5, 4, seed=1), randn(3, 4, seed=2)
    first = (queries[0] @ torch.cat([keys, newer[:2]]).T).softmax(0)[:5]
    second = (queries[1] @ torch.cat([keys, newer]).T).softmax(0)[:5]
    torch.testing.assert_close(peaks(queries, keys, newer), torch.maximum(first, second))
    torch.testing.assert_close(peaks(queries, keys, newer, (1, 2)), second)


def test_a_span_is_as_good_as_its_best_token_and_the_lead_is_not_looked_for() -> None:
    scores = torch.zeros(200)
    scores[[2, 70, 150, 199]] = torch.tensor([0.9, 0.2, 0.1, 0.3])
    assert best_spans(scores, 4) == ([3, 1, 2, 0], 1, pytest.approx(0.3))
    scores[70] = 0.22
    assert best_spans(scores, 4).near == 2
    assert best_spans(scores, 0).spans[0] == 0


def test_a_live_cache_looks_back_and_does_not_fold_for_it() -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, LENGTH)
    cache = KeepCache(model, "32", "snapkv", chunk=64, period=64)
    cache.index = Index.by(copying_heads(model))
    cache.read(model, ids)
    fork, sources = look_back(model, cache, tokens(1, 9, seed=1), again(model, ids), 128)
    write(model, fork, tokens(1, 9, seed=1), 100)
    assert 64 <= sources.tokens <= 128
    assert fork.keep_layers[0].tail == sources.tokens + 109
    assert (cache.keep_layers[0].tail, cache.index.tokens) == (0, LENGTH)


def test_what_cannot_be_looked_back_at_is_refused() -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, LENGTH)
    _, cache = compact()
    with pytest.raises(KeepKVError, match="one row, got 2 of a question"):
        look_back(model, cache, tokens(2, 9), again(model, ids), 128)
    with pytest.raises(InputError, match="at least 64"):
        look_back(model, cache, tokens(1, 9), again(model, ids), 32)
    cache.index = None
    with pytest.raises(KeepKVError, match="no index"):
        look_back(model, cache, tokens(1, 9), again(model, ids), 128)


def test_a_cache_that_was_left_whole_brings_nothing_back() -> None:
    model = make_model("llama", torch.float32)
    cache = indexed(model, KeepCache(model, "100%", "full"), Recipe(lookback="auto"))
    model(tokens(1, 50), past_key_values=cache)
    _, sources = look_back(model, cache, tokens(1, 9), again(model, tokens(1, 50)), 128)
    assert sources.spans == ()


def test_an_allowance_grows_with_the_text_unless_it_is_given() -> None:
    auto = Recipe(lookback="auto")
    assert [allowance(auto, tokens) for tokens in (100, 4000, 4001)] == [256, 256, 512]
    assert (allowance(Recipe(lookback=100), 9999), allowance(Recipe(), 9999)) == (100, 0)
    for wrong in ("on", 63, -1):
        with pytest.raises(InputError, match="lookback="):
            Recipe(lookback=wrong)


def test_words_rank_the_spans_that_share_some_with_the_question(model_and_tokenizer) -> None:
    pytest.importorskip("bm25s")
    _, tokenizer = model_and_tokenizer
    text = "The ship sails on. " * 30 + "An umbrella is kept in the harbor office. " + "The ship sails on. " * 30
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    place = len(tokenizer(text[: text.index("umbrella")])["input_ids"])
    words = Words.of(tokenizer, ids)
    assert words.ranked("Where is the umbrella?") == [(place + len("umbrella")) // 64]  # where the word ends
    assert words.ranked("Where is the?") == []
    assert words.ranked("Nothing xyz") == []


def test_without_the_package_for_words_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InputError, match=r"keepkv\[eval\]"):
        Words.of(None, tokens(1, 5))
