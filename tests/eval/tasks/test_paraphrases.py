"""Half of the questions about facts are paraphrased: they share no content word with any fact of their text."""

from __future__ import annotations

import random
import re

import pytest

from keepkv.eval.sample import Draw, Prose, Sample
from keepkv.eval.tasks import haystack, registry

PARAPHRASED = [name for name in registry.TASKS if name.endswith("-paraphrased")]
FILLER = "Qq qq qq qq qq qq qq."
STOP = {
    "english": """a about above according after all alone and answer any are as at be been before belong briefly by did do does
        for from give had has have he her his how i if in into is it its list long many mentioned more most much new no not now
        of on one or order other others out she so text than that the their them then there these they this those through to
        told under until up was we were what when where which while who whom whose why will with would you""",
    "german": """als am an auf aus bei das dass dem den der des die ein eine einem einen einer eines er für hat ich im in ist
        man mit muss nach sein seine sich sie und von war was welche welchen welcher welches wann wie wo wurde zu zum zur""",
    "french": """a au aux avec ce ces comme comment dans de des du elle en est et faut fut il ils je l la le les ne où par
        pas plus pour qu quand que quel quelle quelles quels qui quoi s sa se ses son sont sur t un une y""",
    "spanish": """a al como con cuál cuándo da de del desde dónde el en es está están ha hay la las le les lo los más para por
        qué que quién se su sus un una y""",
}
NAMES_OF_NOTHING = {"def", "return", "print"}  # of Python


def content_words(text: str, language: str) -> set[str]:
    """The stems of a text's words without stop words, identifiers taken apart."""
    stemmer = pytest.importorskip("snowballstemmer").stemmer(language)
    words = set(re.findall(r"[^\W\d_]+", text.lower())) - set(STOP[language].split()) - NAMES_OF_NOTHING - {"qq", "s"}
    return {stemmer.stemWord(word) for word in words}


def shared(text: str, ask: str, language: str) -> set[str]:
    """The content words that a question shares with a text, also those of which only the first five letters are the same."""
    there, here = content_words(text, language), content_words(ask, language)
    return {word for word in here for other in there if word == other or word[:5] == other[:5] != word[:4]}


def sample_without_prose(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> Sample:
    """A sample in which only the facts have content words."""
    monkeypatch.setattr(haystack, "functions", lambda: (FILLER + "\n\n",) * 500)
    draw = Draw(random.Random(number), Prose((FILLER,) * 500, lambda text: len(text.split())), 400, number)
    return registry.get(name).make(draw)


@pytest.mark.parametrize("name", PARAPHRASED)
def test_paraphrased_questions_share_no_content_word_with_the_facts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_name = name.removesuffix("-paraphrased")
    language = next((language for language in STOP if language in name), "english")
    for number in range(8):
        plain, paraphrased = (sample_without_prose(each, number, monkeypatch) for each in (plain_name, name))
        text = paraphrased.text or " ".join(user for user, _ in paraphrased.turns)
        assert text == (plain.text or " ".join(user for user, _ in plain.turns)), "the same facts"
        assert [question.expected for question in plain.questions] == [question.expected for question in paraphrased.questions]
        for other, question in zip(plain.questions, paraphrased.questions, strict=True):
            assert shared(text, question.ask, language) == set(), question.ask
            assert shared(text, other.ask, language), "a plain question has the fact's words"


def test_every_task_about_facts_has_both_halves() -> None:
    plain = {name.removesuffix("-paraphrased") for name in PARAPHRASED}
    assert plain <= set(registry.TASKS)
    keys_only = {
        "needles-4",
        "needles-8",
        "needles-8-uuids",
        "multi-query",
        "pairs",
        "json-values",
        "variables",
        "common",
        "frequent",
        "json",
        "instructions",
        "fidelity",
        "drift",
    }
    assert set(registry.TASKS) - set(PARAPHRASED) - plain == keys_only, "tasks whose questions cannot be put in other words"
