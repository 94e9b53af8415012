"""A text may hold anything, also what marks places inside while a chat template is applied."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers import FOX, converse
from keepkv import InputError
from keepkv.models import loading
from keepkv.text.conversation import Conversation, turn_template
from keepkv.text.prompt import Prompt, marks

MARKS = " ".join(f"\u2402keepkv{tail}\u2403" for tail in ("", "-0", "-1", "-2", "-3"))


def test_marks_are_in_no_text() -> None:
    assert len(set(marks(3, FOX))) == 3
    found = marks(3, MARKS, "\u2402keepkv-5\u2403")
    assert not any(mark in MARKS for mark in found)
    assert "\u2402keepkv-5\u2403" not in found
    assert all(mark.find(mark[0], 1) == -1 for mark in found)  # so that none can begin within another


@pytest.mark.parametrize("text", [MARKS, f"{MARKS}\n\n", MARKS[:-1], f"\u2402keepkv-0{FOX}"])
def test_a_text_may_hold_the_marks(folder: str, text: str) -> None:
    _, tokenizer = loading.load(folder)
    prompt = Prompt(tokenizer, text)
    read = tokenizer.decode(prompt.text[0])
    assert read == f"<|user|>{text.strip()}\n"
    assert prompt.lead == len("<|user|>")
    assert prompt.before == "\n"
    assert prompt.after == "<|assistant|>"
    assert len(prompt.spans("keepkv")) == text.count("keepkv")


def test_a_system_prompt_may_hold_the_marks(folder: str) -> None:
    model, tokenizer = loading.load(folder)
    assert turn_template(tokenizer, MARKS) == (f"<|system|>{MARKS}<|user|>", "<|user|>", "<|assistant|>")
    talk = converse((model, tokenizer), system=MARKS, budget="4000")
    talk.say(MARKS, max_new_tokens=2)
    assert tokenizer.decode(talk.ids[0]).startswith(f"<|system|>{MARKS}<|user|>{MARKS}<|assistant|>")


@pytest.mark.parametrize("shown", ["", "{{ m['content'] }}{{ m['content'] }}", "{{ m['content'] | upper }}"])
def test_a_template_that_does_not_show_the_message_is_refused(folder: str, shown: str) -> None:
    model, tokenizer = loading.load(folder)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>" + shown + "{% endfor %}<|assistant|>"
    with pytest.raises(InputError, match="does not show the user's message"):
        Prompt(tokenizer, FOX)
    with pytest.raises(InputError, match="takes no conversation"):
        Conversation(model, tokenizer)


def test_a_conversation_that_cannot_be_loaded_changes_nothing(folder: str, tmp_path) -> None:
    talk = converse(loading.load(folder), budget="4000")
    talk.say("Hello", max_new_tokens=3)
    talk.save(tmp_path / "talk.json")
    before = dict(vars(talk))
    turns = list(talk.turns)

    def stop(title: str):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.load(tmp_path / "talk.json", stop)
    assert vars(talk) == before
    other = converse(loading.load(folder), budget="4000")
    other.load(tmp_path / "talk.json")
    assert other.turns == turns
    assert replace(other.turns[0], answer="") == replace(turns[0], answer="")
    with pytest.raises(InputError, match="no turn to take back"):
        other.undo()


@pytest.mark.parametrize(
    "shown",
    [
        "{{ m['content'] }}{{ m['content'][:9] }}",
        "{{ m['content'] | tojson }}",
        "{{ m['content'][:40] }}",
        "{{ none() }}",
        "{{ m['content'][3:30] }}{{ m['content'] }}",
        "{{ m['content'] | length }}{{ m['content'] }}",
    ],
)
def test_a_template_never_shows_a_part_of_the_message_unnoticed(folder: str, shown: str) -> None:
    _, tokenizer = loading.load(folder)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>" + shown + "{% endfor %}<|assistant|>"
    with pytest.raises(InputError, match="does not show the user's message"):
        Prompt(tokenizer, FOX)


def test_a_template_that_wants_a_list_of_parts_gets_it(folder: str) -> None:
    _, tokenizer = loading.load(folder)
    body = "<|{{ m.role }}|>{% for part in m.content %}{{ part.text }}{% endfor %}"
    tokenizer.chat_template = "{% for m in messages %}" + body + "{% endfor %}<|assistant|>"
    assert tokenizer.decode(Prompt(tokenizer, FOX).text[0]) == f"<|user|>{FOX.strip()}\n"
    assert turn_template(tokenizer, "Be brief.") == ("<|system|>Be brief.<|user|>", "<|user|>", "<|assistant|>")


def test_a_template_that_drops_the_system_prompt_is_refused(folder: str) -> None:
    _, tokenizer = loading.load(folder)
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|a|>"
    turn_template(tokenizer)
    with pytest.raises(InputError, match="takes no system prompt"):
        turn_template(tokenizer, "Be brief.")


def test_a_regular_expression_has_its_time(folder: str, monkeypatch) -> None:
    monkeypatch.setattr("keepkv.text.prompt._PATIENCE", 0.2)
    prompt = Prompt(loading.load(folder)[1], "a" * 60 + "b")
    with pytest.raises(InputError, match="seconds to look for"):
        prompt.spans("(a|a)+$")
    for wrong in ("(", "(?R)", "a{99999999999}", "((a{999}){999}){999}"):
        with pytest.raises(InputError, match=r"is not a regular expression|repetitions"):
            prompt.spans(wrong)
