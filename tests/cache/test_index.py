"""The index: 4-bit keys of every token that was compressed, however the text was cut."""

from __future__ import annotations

import pytest
import torch

from helpers import EVERYTHING, make_model, tokens
from keepkv import KeepCache, KeepKVError
from keepkv.cache.index import Index
from keepkv.types import CopyingHead

HEADS = (CopyingHead(1, 0, 0.9, 1), CopyingHead(0, 0, 0.5, 0))


def whole_keys(family: str, ids: torch.Tensor) -> list[torch.Tensor]:
    cache = KeepCache(make_model(family), auto=False)
    make_model(family)(ids, past_key_values=cache)
    return [cache.keep_layers[head.layer].keys[0, head.head] for head in HEADS]


def assert_has(index: Index, keys: list[torch.Tensor]) -> None:
    for number, exact in enumerate(keys):
        ours = torch.cat(index.keys(number))
        assert len(ours) == index.tokens
        exact = exact[: index.tokens]
        extent = exact.amax(0) - exact.amin(0)
        assert ((ours - exact).abs() <= extent / 15).all()  # half a step of 15 in every tile, and what bfloat16 rounds


def test_the_best_few_heads_are_indexed() -> None:
    shares = [0.8, 0.7, 0.41, 0.4, 0.4, 0.39]
    heads = [CopyingHead(0, i, share) for i, share in enumerate(shares)]
    assert Index.by(heads).heads == tuple(heads[:4])
    assert Index.by(heads[:2] + heads[5:]).heads == tuple(heads[:2])


@pytest.mark.parametrize("chunk", [0, 7, 32, 64, 150])
@pytest.mark.parametrize("tail", [0, 5])
def test_every_token_is_in_it_once_at_its_place(family: str, chunk: int, tail: int) -> None:
    model, ids = make_model(family), tokens(1, 150)
    cache = KeepCache(model, "40", EVERYTHING, chunk=chunk, tail=tail)
    cache.index = Index(HEADS)
    cache.read(model, ids)
    assert cache.index.tokens == 150 - cache.keep_layers[0].tail
    assert cache.index.tokens > 100
    assert_has(cache.index, whole_keys(family, ids))


def test_what_is_read_later_joins_it_when_it_is_folded() -> None:
    model, ids = make_model(), tokens(1, 150)
    cache = KeepCache(model, "40", EVERYTHING, period=16)
    cache.index = Index(HEADS)
    for lo in range(0, 150, 11):
        model(ids[:, lo : lo + 11], past_key_values=cache)
    assert 130 < cache.index.tokens == 150 - cache.keep_layers[0].tail
    assert_has(cache.index, whole_keys("llama", ids))


def test_forks_share_it_and_go_on_by_themselves() -> None:
    model, ids = make_model(), tokens(1, 100)
    cache = KeepCache(model, "40", EVERYTHING, period=16)
    cache.index = Index(HEADS)
    model(ids[:, :64], past_key_values=cache)
    twin = cache.fork()
    model(ids[:, 64:], past_key_values=twin)
    assert (cache.index.tokens, twin.index.tokens) == (64, 100)
    assert twin.index.parts[0] is cache.index.parts[0]
    twin.reset()
    assert (twin.index.tokens, twin.index.heads) == (0, HEADS)


def test_its_bytes_are_counted() -> None:
    model, ids = make_model(), tokens(1, 128)
    cache = KeepCache(model, "25%", "snapkv", auto=False)
    cache.index = Index(HEADS)
    model(ids, past_key_values=cache)
    assert cache.report().index_bytes == 0
    report = cache.compress().report()
    tiles = 2 * 2 * 16 * (2 + 8)  # two heads, two tiles, 16 channels: a step in bfloat16, the least in float64
    assert report.index_bytes == 2 * 128 * 16 // 2 + tiles
    assert "to look back by" in str(report)


def test_a_batch_has_none() -> None:
    model = make_model()
    cache = KeepCache(model, "25%", "snapkv")
    cache.index = Index(HEADS)
    with pytest.raises(KeepKVError, match="an index is of one text"):
        model(tokens(2, 64), past_key_values=cache)
