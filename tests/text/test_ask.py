"""Answers: where they end."""

from __future__ import annotations

import pytest

from keepkv import KeepCache
from keepkv.text.ask import greedy
from keepkv.text.prompt import Prompt


def test_a_base_model_does_not_ask_itself_on(model_and_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_and_tokenizer
    written = "Felix.\nQuestion: And who else?\nAnswer: Greta."
    monkeypatch.setattr(type(tokenizer), "decode", lambda *args, **options: written)
    for template in (tokenizer.chat_template, None):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        prompt = Prompt(tokenizer, "A short text. ")
        cache = KeepCache(model, 1.0)
        model(prompt.text, past_key_values=cache)
        answer = greedy(model, tokenizer, cache, prompt.text, prompt.question("Who?"), "Who?", 4).answer
        assert answer == (written if template else "Felix.")
