"""Compiled documents come back whole, and only for the model that they were made for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import make_model
from keepkv.documents.document import answer, load, save
from keepkv.errors import InputError


def test_a_document_comes_back_whole(compiled, model_and_tokenizer) -> None:
    document, file = compiled
    again = load(file, *model_and_tokenizer)
    assert torch.equal(again.ids, document.ids)
    assert (again.lead, again.before, again.after, again.recipe, again.source) == (
        document.lead, document.before, document.after, document.recipe, document.source,
    )  # fmt: skip
    assert again.lead == len("<|user|>")
    for index in range(3):
        assert all(map(torch.equal, again.exact(index), document.exact(index)))
    told = [answer(*model_and_tokenizer, each, ["Who?"], 6).answers[0].tokens for each in (document, again)]
    assert told[0] == told[1]


def test_a_file_without_ids_answers_the_same_and_does_not_hold_the_text(compiled, model_and_tokenizer, tmp_path: Path) -> None:
    document, _ = compiled
    file = tmp_path / "private.keep"
    save(document, file, *model_and_tokenizer, with_ids=False)
    again = load(file, *model_and_tokenizer)
    assert again.ids is None
    told = [answer(*model_and_tokenizer, each, ["Who?"], 6).answers[0].tokens for each in (document, again)]
    assert told[0] == told[1]


def test_another_model_precision_or_tokenizer_is_refused(compiled, model_and_tokenizer) -> None:
    _, file = compiled
    model, tokenizer = model_and_tokenizer
    for changes in ({"seed": 1}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, {"num_hidden_layers": 2}):
        other = make_model("llama", torch.float32, vocab_size=256, max_position_embeddings=4096, **changes)
        with pytest.raises(InputError, match="compiled with a model with other"):
            load(file, other, tokenizer)
    with pytest.raises(InputError, match="another family"):
        load(file, make_model("qwen3", torch.float32, vocab_size=256), tokenizer)
    half = make_model("llama", torch.bfloat16, vocab_size=256, max_position_embeddings=4096)
    with pytest.raises(InputError, match="--dtype float32"):
        load(file, half, tokenizer)
    with pytest.raises(InputError, match="another tokenizer"):
        load(file, model, "another")
