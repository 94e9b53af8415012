"""Answers that are written together are those that are written alone."""

from __future__ import annotations

import pytest
import torch

from helpers import make_model, read, tokens
from keepkv import KeepCache
from keepkv.eval.writing import write
from keepkv.text.ask import greedy

LENGTHS = (5, 9, 5, 7, 1)


class Words:
    """A tokenizer that writes numbers."""

    eos_token_id = 1
    chat_template = "{{ messages }}"

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


class Asking(Words):
    """One that writes the next question in place of one number, and has no chat template."""

    chat_template = ""

    def __init__(self, number: str) -> None:
        self.number = number

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join("\nQuestion:" if str(i) == self.number else str(i) for i in ids)


@pytest.mark.parametrize("options", [
    {"budget": "25%", "method": "snapkv"},
    {"budget": "25%", "method": "snapkv", "slot_dtype": "int8"},
    {"budget": "100%", "method": "full"},
    {"budget": "40", "method": "snapkv", "period": 16},
], ids=str)  # fmt: skip
def test_a_batch_of_questions_gets_the_answers_of_each_alone(family: str, options: dict[str, object]) -> None:
    model = make_model(family)
    text = tokens(1, 70)
    cache = read(model, text, **options)
    questions = [tokens(1, length, seed=length + i) for i, length in enumerate(LENGTHS)]
    expected = [tokens(1, length, seed=20 + i) for i, length in enumerate((3, 1, 6, 2, 4))]
    before = cache.report()
    found = write(model, Words(), cache, questions, expected, 8)
    for question, answer, written in zip(questions, expected, found, strict=True):
        alone = greedy(model, Words(), cache.fork(), text, question, "", 8)
        assert written.text == alone.answer
        after = cache.fork()
        logits = model(torch.cat([question, answer], 1), past_key_values=after).logits[0, question.shape[1] - 1 : -1]
        loglik = logits.log_softmax(-1).gather(1, answer[0, :, None]).mean()
        assert written.loglik == pytest.approx(float(loglik), abs=2e-6)
    assert cache.report() == before, "the cache itself goes on from where it was"


def test_an_answer_ends_where_the_model_ends_it() -> None:
    model = make_model()
    cache = KeepCache(model, "100%", "full")
    model(tokens(1, 40), past_key_values=cache)
    questions, expected = [tokens(1, n, seed=n) for n in (4, 6)], [tokens(1, 2)] * 2
    whole = [one.text.split() for one in write(model, Words(), cache, questions, expected, 8)]
    assert [len(words) for words in whole] == [8, 8]
    end = whole[0][3]
    asked = [one.text.split() for one in write(model, Asking(end), cache, questions, expected, 8)]
    model.generation_config.eos_token_id = [int(end), 96]
    cut = [one.text.split() for one in write(model, Words(), cache, questions, expected, 8)]
    assert cut[0] == whole[0][: whole[0].index(end)]
    assert cut[1] == (whole[1][: whole[1].index(end)] if end in whole[1] else whole[1])
    assert asked == cut, "what follows the answer is no answer"
