"""Pages, and a paged request against a live KeepCache. vLLM itself: tests_vllm."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers.cache_utils import Cache

from helpers import make_model, tokens
from keepkv import KeepCache
from keepkv.cache.layer import KeepLayer
from keepkv.cache.proxies import Proxy
from keepkv.cache.self_check import unchecked
from keepkv.models import families
from keepkv.serving.paged import CELL, PagedConfig, Pages, new_watch, step
from keepkv.serving.settings import Settings
from keepkv.slots.slots import Slots

SETTINGS = Settings(budget=32, window=16, step=32, references=64)
BLOCK = 16


class PagedCache(Cache):
    """A model's cache in pages that lie anywhere, as an engine would hold one request's."""

    def __init__(self, model, settings: Settings, pages: list[Pages], table: torch.Tensor) -> None:
        super().__init__(layers=[KeepLayer() for _ in pages])
        self.settings, self.pages, self.table, self.read = settings, pages, table, 0
        self.rotation, self.watches = unchecked(model).at(2)[0], {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.read

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.read + query_length, 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        new = key_states.shape[2]
        places = torch.arange(self.read, self.read + new)
        cells = self.table[places // BLOCK] * BLOCK + places % BLOCK
        self.pages[layer_idx].write(cells, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        attend = partial(self._attention, layer_idx, new)
        return tuple(Proxy.of(x, self.read + new, attend) for x in (key_states, value_states))

    def _attention(self, layer_idx, new, call):
        config = PagedConfig(self.settings, self.settings.uniform_method(), call.scale, self.rotation)
        watch = self.watches.get(layer_idx) or new_watch(config, layer_idx)
        output, self.watches[layer_idx] = step(
            self.pages[layer_idx], self.table, call.query[0].transpose(0, 1), self.read, config, watch
        )
        if layer_idx == len(self.pages) - 1:
            self.read += new
        return output.transpose(0, 1)[None]


def new_pages(model, pages: int) -> list[Pages]:
    """Pages full of NaN, as an engine's memory may be."""
    heads, size = families.key_shape(model)
    width = 2 * size + CELL // model.dtype.itemsize
    cells = [
        torch.full((pages, heads, BLOCK, width), torch.nan, dtype=model.dtype) for _ in range(model.config.num_hidden_layers)
    ]
    return [Pages.of(own, size, size) for own in cells]


@pytest.mark.parametrize("method", ["keepkv", "snapkv", "keepkv-exact", "streaming", "h2o", "tova"])
@pytest.mark.parametrize("cuts", [[64, 64, 32, *[1] * 80], [7, 100, 1, 1, 90, *[1] * 20], [160, *[1] * 40]])
def test_a_paged_request_is_a_live_cache(method: str, cuts: list[int]) -> None:
    settings = Settings(**{**SETTINGS.to_dict()["keepkv"], "method": method})
    model = make_model()
    ids = tokens(1, sum(cuts))
    table = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:20]
    paged = PagedCache(model, settings, new_pages(model, 40), table)
    live = KeepCache(
        model,
        settings.budget,
        settings.uniform_method(),
        slot_dtype="float",
        period=10**6,
        auto=False,
        references=settings.references,
    )
    compressions = 0
    for last, new in zip(itertools.accumulate(cuts), cuts, strict=True):
        chunk = ids[:, last - new : last]
        ours = model(chunk, past_key_values=paged).logits
        theirs = model(chunk, past_key_values=live).logits
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
        if settings.covered(last) > settings.covered(last - new):
            live.recipe = replace(live.recipe, tail=last - settings.covered(last))
            live.compress()
            compressions += 1
            assert live.keep_layers[0].slots.counts == [settings.budget] * 2
    assert compressions >= 2 or len(cuts) == 41


def test_with_whole_steps_a_paged_request_is_the_librarys_own_live_cache() -> None:
    """Window and chunks are whole steps: KeepCache compresses by itself at the same tokens."""
    settings = Settings(budget=32, window=32, step=32, references=64)
    model = make_model("qwen3")
    ids = tokens(1, 300)
    paged = PagedCache(model, settings, new_pages(model, 30), torch.arange(29, 9, -1))
    options = {"slot_dtype": "float", "chunk": 64, "period": 32, "tail": 32, "references": 64}
    live = KeepCache(model, 32, settings.uniform_method(), **options)
    for first, last in [*itertools.pairwise(range(0, 193, 64)), *((n, n + 1) for n in range(192, 300))]:
        ours, theirs = (model(ids[:, first:last], past_key_values=cache).logits for cache in (paged, live))
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    assert live.report().compressions == 5


def test_two_requests_share_pages_without_touching_each_other() -> None:
    model = make_model()
    pages, alone = new_pages(model, 40), new_pages(model, 20)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    ids = tokens(2, 150)
    both = [PagedCache(model, SETTINGS, pages, order[:20]), PagedCache(model, SETTINGS, pages, order[20:])]
    single = PagedCache(model, SETTINGS, alone, torch.arange(20))
    for first, last in itertools.pairwise(range(0, 151, 30)):
        one, _ = (model(ids[row, None, first:last], past_key_values=both[row]).logits for row in (0, 1))
        torch.testing.assert_close(one, model(ids[:1, first:last], past_key_values=single).logits, atol=1e-9, rtol=1e-9)


def test_dead_pages_are_never_read_again() -> None:
    """What lies between slots and tail may belong to another request: garbage there changes nothing."""
    model, ids = make_model(), tokens(1, 200)
    runs = []
    for spoil in (False, True):
        paged, logits = PagedCache(model, SETTINGS, new_pages(model, 20), torch.arange(20)), []
        for first, last in itertools.pairwise(range(0, 201, 20)):
            logits.append(model(ids[:, first:last], past_key_values=paged).logits)
            covered = SETTINGS.covered(last)
            if spoil and covered:
                for x in itertools.chain(*paged.pages):
                    x[SETTINGS.budget // BLOCK : covered // BLOCK] = -1
        runs.append(torch.cat(logits, 1))
    assert torch.equal(*runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pages_give_back_what_was_stored(dtype: torch.dtype) -> None:
    cells = torch.zeros(9, 2, BLOCK, 2 * 8 + CELL // dtype.itemsize, dtype=dtype)
    pages, table = Pages.of(cells, 8, 8), torch.tensor([4, 7, 1])
    counts = [30, 32]
    slots = Slots(
        torch.randn(62, 8, dtype=dtype), torch.randn(62, 8, dtype=dtype), torch.randn(62), torch.arange(62, dtype=torch.int32),
        (0, 30, 62),
    )  # fmt: skip
    pages.store(table, 32, slots)
    again = pages.slots(table, 32)
    assert again.counts == [32, 32]
    for name in ("keys", "values", "bias", "positions"):
        old, new = getattr(slots, name), getattr(again, name)
        assert torch.equal(new[2:32], old[:30])
        assert torch.equal(new[32:], old[30:])
    assert again.bias[:2].isneginf().all()
    keys = torch.randn(20, 2, 8, dtype=dtype)
    pages.write(
        torch.cat([table[1:2] * BLOCK + torch.arange(16), table[2:] * BLOCK + torch.arange(3), torch.tensor([-1])]), keys, keys
    )
    got, _ = pages.tokens(table, 16, 35)
    assert torch.equal(got, keys[:19].transpose(0, 1))
    assert (cells[[0, 2, 3, 5, 6, 8]] == 0).all()
    assert sum(counts) == 62
