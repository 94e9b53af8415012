"""KVzip: what the repetition of the text asks for."""

from __future__ import annotations

import pytest
import torch

from helpers import make_model, randn64, tokens
from keepkv import KeepCache, KeepKVError, methods
from keepkv.observe.repetition import WHOLE, attend_piece
from keepkv.slots.slots import Slots
from methods.observed import INF


def test_kvzip_counts_shares_among_sinks_piece_and_repetition() -> None:
    keys, values, queries = randn64(1, 50, 16), randn64(1, 50, 16, seed=1), randn64(1, 20, 16, seed=2)
    positions = torch.arange(40, dtype=torch.int32)
    draft = Slots(keys[0, :40], values[0, :40], torch.zeros(40), positions, (0, 40))
    output, peak = attend_piece(queries, keys, values, 10, draft, 20, 30, how=WHOLE)
    hidden = torch.ones(10, 10, dtype=torch.bool).triu(1).repeat(2, 1)
    logits = queries[0] @ keys[0].T
    logits[:, 40:] = logits[:, 40:].masked_fill(hidden, -INF)
    torch.testing.assert_close(output[0], logits.softmax(1) @ values[0])
    counted = [*range(4), *range(20, 30), *range(40, 50)]
    torch.testing.assert_close(peak[0, 20:30], logits[:, counted].softmax(1)[:, 4:14].amax(0))


def test_kvzip_spends_where_the_repetition_asks_and_refuses_to_go_without() -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, 90)
    cache = KeepCache(model, 0.3, "kvzip").read(model, ids)
    repeated = KeepCache(model, auto=False)
    model(ids, past_key_values=repeated)
    repeated.repeat(model, ids, how=methods.get("kvzip").repeat)
    asked = torch.stack([layer.watch.repeat_peak for layer in repeated.keep_layers])
    kept = torch.zeros_like(asked, dtype=torch.bool)
    for index, layer in enumerate(cache.keep_layers):
        for head, (lo, hi) in enumerate(zip(layer.slots.offsets, layer.slots.offsets[1:], strict=False)):
            kept[index, head, layer.slots.positions[lo:hi].long()] = True
    free = torch.ones(90, dtype=torch.bool)
    free[:4] = False  # sinks always stay
    assert asked[..., free][kept[..., free]].min() >= asked[..., free][~kept[..., free]].max()
    plain = KeepCache(model, 0.3, "kvzip", auto=False)
    model(ids, past_key_values=plain)
    with pytest.raises(KeepKVError, match="repeat"):
        plain.compress()
    assert not plain.compressed
