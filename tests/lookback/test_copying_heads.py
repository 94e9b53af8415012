"""Copying heads: the share is what it is said to be, and every model with full attention in some layer has some."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import make_model, observation, randn
from keepkv.lookback import copying_heads as module
from keepkv.lookback.copying_heads import TOKENS, copied, copying_heads, measure_heads, twice


def test_every_head_of_full_attention_is_listed_by_its_share(family: str) -> None:
    heads = measure_heads(make_model(family))
    shares = [head.share for head in heads]
    assert shares == sorted(shares, reverse=True)
    assert all(0 < share < 1 for share in shares)
    layers = 2 if family == "gemma3" else 3  # gemma3's first layer has a window, and is not counted
    assert {head.layer for head in heads} == set(range(layers))
    assert len({(head.layer, head.head) for head in heads}) == len(heads)


def test_the_share_is_that_of_the_token_after_the_earlier_place() -> None:
    seen = observation(2 * 12 + 1)
    shares = torch.zeros(2, 3)
    for head in range(2):
        for query in range(3):
            logits = 0.25 * seen.queries[head, query] @ seen.keys[head].T
            found = [logits[p, : p + 1].softmax(0)[p - 12 + 1] for p in range(13, 24)]
            shares[head, query] = sum(found) / len(found)
    torch.testing.assert_close(copied(seen), shares)


def test_a_head_that_copies_has_a_share_of_one() -> None:
    seen = observation(2 * 12 + 1)
    keys = 50 * torch.nn.functional.normalize(randn(12, 16), dim=1)
    seen.keys[:] = torch.cat([keys[:1], keys, keys])
    seen.queries[:, 1, 13:24] = 5 * seen.keys[:, 2:13]  # each asks for what comes after its earlier place
    seen.keys[:, 14:] = 0  # what stands there the second time is not asked for
    torch.testing.assert_close(copied(seen)[:, 1], torch.ones(2))


def test_the_sequence_stands_there_twice_and_has_no_special_tokens() -> None:
    ids = twice(make_model())[0]
    assert len(ids) == 1 + 2 * TOKENS
    assert torch.equal(ids[1 : TOKENS + 1], ids[TOKENS + 1 :])
    assert not set(ids[1:].tolist()) & {0, 1, 2}
    assert torch.equal(twice(make_model())[0], ids)
    assert not torch.equal(twice(make_model(), seed=1)[0], ids)


def test_a_model_is_asked_once(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    heads = copying_heads(model)
    assert heads == measure_heads(model)
    monkeypatch.setattr(module, "measure_heads", lambda *_: pytest.fail("asked again"))
    assert copying_heads(model) == heads
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        copying_heads(make_model(seed=1))


def test_a_broken_file_or_a_folder_that_cannot_be_written_is_as_none(own_folder: Path) -> None:
    model = make_model()
    heads = copying_heads(model)
    (file,) = (own_folder / "copying-heads").iterdir()
    file.write_text("[[1, 2")
    assert copying_heads(model) == heads
    file.unlink()
    file.parent.rmdir()
    (own_folder / "copying-heads").write_text("")
    assert copying_heads(model) == heads
