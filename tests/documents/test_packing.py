"""Caches as tensors: what is loaded answers bit for bit as what was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import make_model, tokens
from keepkv import KeepCache
from keepkv.documents import format
from keepkv.documents.packing import pack, unpack
from keepkv.errors import InputError


def written(cache: KeepCache, file: Path) -> None:
    header, tensors = pack(cache)
    format.write(file, header, tensors)


@pytest.mark.parametrize(
    ("method", "slot_dtype"),
    [*((name, "float") for name in ("keepkv", "snapkv", "minicache", "full", "streaming-shifted")),
     ("keepkv", "int4"), ("snapkv", "int8"), ("snapkv", "int2"), ("keepkv", "bfloat16"), ("kivi", "int4"),
     ("keepkv", "auto"), ("snapkv", "auto"), ("minicache", "auto")],
)  # fmt: skip
def test_what_is_loaded_answers_bit_for_bit_the_same(family: str, method: str, slot_dtype: str, tmp_path: Path) -> None:
    model = make_model(family, torch.float32)
    if method == "minicache" and family == "gemma3":
        pytest.skip("two layers with full attention are too few to share")
    cache = KeepCache(model, 0.4, method, slot_dtype=slot_dtype)
    model(tokens(1, 60), past_key_values=cache)
    model(tokens(1, 5, seed=1), past_key_values=cache)  # an exact tail
    written(cache, tmp_path / "a.keep")
    again = unpack(format.Contents(tmp_path / "a.keep"), model, model.device)
    later = tokens(1, 4, seed=2)
    assert again.get_seq_length() == cache.get_seq_length()
    ours, theirs = (model(later, past_key_values=each.fork()).logits for each in (cache, again))
    assert torch.equal(ours, theirs)
    assert again.report().heads == cache.report().heads
    assert again.report().slot_dtype == cache.report().slot_dtype
    assert cache.report().slot_dtype == slot_dtype or slot_dtype == "auto"
    held = again.report().kv_bytes
    assert 0.7 * cache.report().kv_bytes < held <= cache.report().kv_bytes  # a sliding window's view holds some more


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model = make_model(dtype=torch.float32)
    cache = KeepCache(model, 0.5)
    with pytest.raises(InputError, match="nothing"):
        pack(cache)
    model(tokens(2, 40), past_key_values=cache)
    with pytest.raises(InputError, match="one text"):
        pack(cache)
    single = KeepCache(model, 0.5)
    model(tokens(1, 40), past_key_values=single)
    with pytest.raises(InputError, match="cannot be written"):
        written(single, tmp_path / "none" / "a.keep")
    assert not list(tmp_path.iterdir())
