"""Prompts: text and question are tokenized as one, and spans are found in the text."""

from __future__ import annotations

import pytest

from helpers import FOX, LOG


@pytest.mark.parametrize("question", ["Who sank?", "«Why» now?", "(a) What?", " \n What? "])
@pytest.mark.parametrize("end", [".", '."', "\n", "| 7 |", "…", ":"])
def test_text_and_question_are_cut_as_if_they_were_seen_together(smollm2, end: str, question: str) -> None:
    from keepkv.text.prompt import Prompt

    _, tokenizer = smollm2
    text = LOG.read_text()[:500] + end
    chat = [{"role": "user", "content": f"{text.strip()}\n\n{question.strip()}"}]
    whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    prompt = Prompt(tokenizer, text)
    assert prompt.text[0].tolist() + prompt.question(question)[0].tolist() == whole


TEXT = FOX * 12


def test_spans_cover_what_is_matched(folder: str) -> None:
    from keepkv.models import loading
    from keepkv.text.prompt import Prompt

    _, tokenizer = loading.load(folder, "cpu", "auto")
    prompt = Prompt(tokenizer, TEXT)
    spans = prompt.spans(r"lazy dog\b")
    assert len(spans) == 12
    for first, last in spans:
        assert "lazy dog" in tokenizer.decode(prompt.text[0, first:last])
        assert "lazy dog" not in tokenizer.decode(prompt.text[0, first + 1 : last])
        assert "lazy dog" not in tokenizer.decode(prompt.text[0, first : last - 1])
