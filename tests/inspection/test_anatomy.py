"""What inspect says about a compression is what the cache holds."""

from __future__ import annotations

from statistics import fmean

import pytest
from transformers import AutoTokenizer

from helpers import make_model, tokens
from inspection.dissected import LENGTH, dissect
from keepkv import InputError, KeepCache
from keepkv.inspection import anatomy
from keepkv.inspection.html import page
from keepkv.slots.slot_dtype import SLOT_DTYPES


def test_the_heads_are_those_of_the_cache(family: str) -> None:
    cache, found = dissect(family)
    report = cache.report()
    full = [i for i, layer in enumerate(cache.layers) if layer in cache.keep_layers]
    assert [layer[0].layer for layer in found.layers] == full
    price = cache.keep_layers[0].price(SLOT_DTYPES[report.slot_dtype])
    paid = len(found.heads) * (0.1 * LENGTH * price.token - price.head)
    assert sum(head.result.slots for head in found.heads) == int(paid / price.slot)
    assert report.kept == (tuple(tuple(head.result.slots for head in layer) for layer in found.layers),)
    assert report.slots_per_head == pytest.approx(sum(found.keepers) / len(found.heads))
    for head in found.heads:
        assert len(head.positions) == len(head.votes) == head.result.slots
        assert list(head.positions) == sorted(set(head.positions))
        assert max(head.votes, default=0) == pytest.approx(head.result.max_vote)
        assert 0 <= head.result.error <= head.result.evict_error
    assert sum(found.votes) == pytest.approx(sum(vote for head in found.heads for vote in head.votes))
    assert all(bool(votes) <= bool(kept) for votes, kept in zip(found.votes, found.keepers, strict=True))
    assert report.error == fmean(head.result.error for head in found.heads)
    assert report.max_vote == max(head.result.max_vote for head in found.heads)


def test_a_method_that_holds_nothing_out_has_no_errors_to_show() -> None:
    _, found = dissect(method="snapkv")
    assert not found.judged
    assert found.to_dict()["error"] is None
    assert {head["error"] for head in found.to_dict()["heads"]} == {None}
    assert set(found.votes) <= set(range(len(found.heads) + 1))
    assert "has no errors to show" in page(found)


def test_nothing_compressed_is_nothing_to_inspect() -> None:
    cache = KeepCache(make_model(), 1.0)
    make_model()(tokens(1, 50), past_key_values=cache)
    assert cache.report().heads == ()
    with pytest.raises(InputError, match="nothing to inspect"):
        anatomy.of(cache, ["x"] * 50)


def test_pieces_join_to_the_text(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "naïve 日本 🙂 <b>\n\n end"
    ids = tokenizer(text)["input_ids"]
    parts = anatomy.token_texts(tokenizer, ids)
    assert len(parts) == len(ids)
    assert "".join(parts) == text
    assert "🙂" in parts
    cut = anatomy.token_texts(tokenizer, tokenizer("🙂")["input_ids"][:2])
    assert len(cut) == 2
