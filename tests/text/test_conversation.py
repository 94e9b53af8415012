"""Conversations: turns over one live cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import converse
from keepkv import InputError
from keepkv.recipe import CONVERSATION
from keepkv.text.conversation import Conversation


def test_turns_are_tokens_of_the_template_one_after_the_other(model_and_tokenizer) -> None:
    """What is fed turn by turn is what the template makes of the whole conversation."""
    model, tokenizer = model_and_tokenizer
    talk = converse(model_and_tokenizer, budget="100%")
    for text in ("One", "two?", "three"):
        talk.say(text, max_new_tokens=9)
    messages = []
    for turn in talk.turns:
        messages += [{"role": "user", "content": turn.user}]
        messages += [{"role": "assistant", "content": tokenizer.decode(_answer_ids(talk, len(messages) // 2))}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("<|assistant|>")  # the next answer's
    assert tokenizer.decode(talk.ids[0]) == whole
    with torch.no_grad():  # nothing compressed: the next word is the full cache's
        mine = model(talk.ids[:, talk.cache.get_seq_length() :], past_key_values=talk.cache.fork()).logits[0, -1]
        assert torch.allclose(mine, model(talk.ids).logits[0, -1], atol=1e-4)


def _answer_ids(talk: Conversation, turn: int) -> list[int]:
    text = talk.tokenizer.decode(talk.ids[0])
    part = text.split("<|assistant|>")[turn + 1].split("<|user|>")[0]
    return talk.tokenizer(part, add_special_tokens=False)["input_ids"]


def test_a_conversation_stays_in_its_memory(model_and_tokenizer) -> None:
    talk = converse(model_and_tokenizer)
    held = []
    for number in range(12):
        talk.say(f"This is what I have to say, number {number}. " * 3, max_new_tokens=20)
        report = talk.cache.report()
        held.append(report.slots_per_head + report.tail)
    assert talk.cache.report().compressions > 5
    assert max(held) < 40 + 24
    assert talk.cache.get_seq_length() > 1000


def test_undo_is_exact_and_goes_back_once(model_and_tokenizer) -> None:
    talk, twin = converse(model_and_tokenizer), converse(model_and_tokenizer)
    for one in (talk, twin):
        one.say("A first turn that is long enough to be compressed at once.", max_new_tokens=20)
    talk.say("A second one, which is taken back again.", max_new_tokens=30)
    assert talk.undo().user.startswith("A second")
    assert torch.equal(talk.ids, twin.ids)
    assert talk.say("And now?", max_new_tokens=30) == twin.say("And now?", max_new_tokens=30)
    talk.undo()
    with pytest.raises(InputError, match="no turn to take back"):
        talk.undo()


def test_what_goes_wrong_costs_the_turn_alone(model_and_tokenizer) -> None:
    talk, twin = converse(model_and_tokenizer), converse(model_and_tokenizer)
    for one in (talk, twin):
        one.say("Hello there", max_new_tokens=10)

    def hear(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("This breaks off " * 5, hear, max_new_tokens=30)
    with pytest.raises(InputError, match="nothing was said"):
        talk.say("  ")
    assert len(talk.turns) == 1
    assert talk.say("Go on", max_new_tokens=20) == twin.say("Go on", max_new_tokens=20)


def test_stopping_keeps_what_was_heard(model_and_tokenizer) -> None:
    talk, heard, asked = converse(model_and_tokenizer), [], iter(range(200))
    turn = talk.say("Speak", heard.append, lambda: next(asked) >= 7, max_new_tokens=200)
    assert not turn.whole
    assert "".join(heard).strip() == turn.answer
    assert len(talk.tokenizer(turn.answer)["input_ids"]) <= 3 * 8  # eight bytes, of which some are no letters
    talk.say("Go on", max_new_tokens=5)


def test_a_system_prompt_stays_verbatim(model_and_tokenizer) -> None:
    talk = converse(model_and_tokenizer, system="Be brief.", budget="40")
    for number in range(6):
        talk.say(f"Some words to fill the memory, number {number}", max_new_tokens=20)
    size = talk._tokenize(talk._template.head, special=True).shape[1]
    for layer in talk.cache.keep_layers:
        for lo, hi in zip(layer.slots.offsets, layer.slots.offsets[1:], strict=False):
            assert layer.slots.positions[lo:hi].tolist()[:size] == list(range(size))
            assert layer.slots.bias[lo : lo + size].eq(0).all()


def test_saved_and_loaded_it_goes_on(model_and_tokenizer, tmp_path: Path) -> None:
    talk, other = converse(model_and_tokenizer, system="Be brief.", budget="5000"), converse(model_and_tokenizer, budget="5000")
    talk.say("My name is Ada.", max_new_tokens=20)
    talk.save(tmp_path / "talk.json")
    other.load(tmp_path / "talk.json")
    assert other.turns == talk.turns
    assert other.say("Who am I?", max_new_tokens=20) == talk.say("Who am I?", max_new_tokens=20)
    for text, message in (("{}", "not a conversation"), ("[1", "not a conversation"), (None, "another tokenizer")):
        if text is None:
            told = json.loads((tmp_path / "talk.json").read_text())
            text = json.dumps({**told, "tokens": [10**6]})
        (tmp_path / "broken.json").write_text(text)
        before = other.ids
        with pytest.raises(InputError, match=message):
            other.load(tmp_path / "broken.json")
        assert other.ids is before


def test_a_damaged_conversation_is_refused(model_and_tokenizer, tmp_path: Path) -> None:
    talk = converse(model_and_tokenizer, budget="5000")
    talk.say("My name is Ada.", max_new_tokens=3)
    talk.save(tmp_path / "talk.json")
    assert (tmp_path / "talk.json").stat().st_mode & 0o077 == 0
    good, before = json.loads((tmp_path / "talk.json").read_text()), dict(vars(talk))
    for name, values in {
        "tokens": (None, [None], [], [2**70], [-1], [1.5], "x"),
        "turns": (None, [1], [{}], [{"user": 3, "answer": "x"}], [{"user": "\ud800", "answer": "x"}]),
        "system": (None, 1, ["x"], "\ud800"),
        "tokenizer": (None, 3),
        "format": (None, 2, "keepkv conversation 3"),
    }.items():
        for value in values:
            (tmp_path / "bad.json").write_text(json.dumps({**good, name: value}))
            with pytest.raises(InputError, match="is not a conversation saved by keepkv"):
                talk.load(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text(json.dumps({**good, "tokenizer": "0" * 64}))
    with pytest.raises(InputError, match="another tokenizer"):
        talk.load(tmp_path / "bad.json")
    older = {name: value for name, value in good.items() if name != "tokenizer"} | {"format": "keepkv conversation 1"}
    (tmp_path / "bad.json").write_text(json.dumps({**older, "tokens": good["tokens"][::-1]}))  # other words: another tokenizer
    with pytest.raises(InputError, match="another tokenizer"):
        talk.load(tmp_path / "bad.json")
    assert vars(talk) == before
    (tmp_path / "older.json").write_text(json.dumps(older))
    talk.load(tmp_path / "older.json")
    assert [turn.user for turn in talk.turns] == ["My name is Ada."]


def test_a_model_without_a_template_is_asked_questions(model_and_tokenizer) -> None:
    model, tokenizer = model_and_tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        talk = Conversation(model, tokenizer, replace(CONVERSATION, budget="60"))
        talk.say("Who?", max_new_tokens=5)
        talk.say("When?", max_new_tokens=5)
        text = tokenizer.decode(talk.ids[0])
        assert text.startswith("Question: Who?\nAnswer:")
        assert "\n\nQuestion: When?\nAnswer:" in text
    finally:
        tokenizer.chat_template = template
