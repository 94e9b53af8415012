"""Families of models: others are refused."""

from __future__ import annotations

import pytest

from helpers import make_model
from keepkv import KeepCache, ModelError


def test_unsupported_families_are_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ModelError, match="'gpt2' is not supported"):
        KeepCache(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11)))
    with pytest.raises(ModelError, match="sliding window"):
        KeepCache(make_model("mistral", sliding_window=16))
