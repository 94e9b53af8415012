"""Scores of answers, also against other implementations."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from keepkv.errors import InputError
from keepkv.eval import metrics
from keepkv.eval.tasks import registry

WORDS = ["the", "a", "Cat,", "dog.", "sat", "don't", "42", "on", "it's", "mat!"]


def pairs(count: int = 200) -> list[tuple[str, str]]:
    """Answers and right answers of one to eight words, some of which they have in common."""
    rng = random.Random(0)
    return [tuple(" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(2)) for _ in range(count)]


def test_scores() -> None:
    assert metrics.f1("the Cat sat")("A cat sat down") == pytest.approx(2 * 2 / (3 + 2))
    assert metrics.exact("The cat.")("cat") == 1
    assert metrics.last_number("1,200")("first 3, so 1200.") == 1
    assert metrics.last_number("7")("none") == 0
    assert metrics.numbers("Paragraph 3")("Paragraph 3, not 4") == 0.5
    assert metrics.any_of("1,200", "x")("It is 1200.") == 1
    assert metrics.all_of("a", "b", "c", "q")("a c") == 0.5


def test_whole_words_count_and_the_first_of_two() -> None:
    assert metrics.named("Turin")("featuring much") == 0
    assert metrics.named("Turin", "Oslo")("It is Oslo.") == 1
    assert metrics.named("lentil soup")("A Lentil\nsoup!") == 1
    assert metrics.named("77")("177") == 0
    assert metrics.all_named("goat", "cat")("A goat, and cattle.") == 0.5
    first = metrics.first_named("new", "old")
    assert [first(text) for text in ("new", "new, not old", "not old but new", "old", "", "renew")] == [1, 1, 0, 0, 0, 0]


def test_f1_and_exact_match_are_those_of_torchmetrics() -> None:
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    for answer, right in pairs():
        theirs = squad(
            [{"prediction_text": answer, "id": "0"}], [{"answers": {"answer_start": [0], "text": [right]}, "id": "0"}]
        )
        assert 100 * metrics.f1(right)(answer) == pytest.approx(float(theirs["f1"]))
        assert 100 * metrics.exact(right)(answer) == pytest.approx(float(theirs["exact_match"]))


def test_rouge_l_is_that_of_rouge_score_on_english_and_knows_other_letters() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for answer, right in pairs():
        assert metrics.rouge_l(right)(answer) == pytest.approx(scorer.score(right, answer)["rougeL"].fmeasure)
    assert metrics.rouge_l("a b c d")("a x c d") == pytest.approx(0.75)
    assert metrics.rouge_l("x", "a b")("a b") == 1
    assert metrics.rouge_l("für übel")("fuhr ubel") == 0


def test_code_similarity_is_the_edit_similarity_of_the_first_line_of_code() -> None:
    pytest.importorskip("rapidfuzz")
    assert metrics.code_similarity("return x")("```\n# a comment\n\nreturn x\nmore") == 1
    assert metrics.code_similarity("abcd")("abxd") == pytest.approx(1 - 2 / 8)
    assert metrics.code_similarity("abcd")("# nothing") == 0


def test_without_the_extra_a_file_that_needs_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    file = tmp_path / "a.jsonl"
    file.write_text('{"input": "", "context": "Text.", "answers": ["Sum."], "dataset": "gov_report"}\n')
    with pytest.raises(InputError, match=r"package rouge-score: pip install 'keepkv\[eval\]'"):
        registry.from_file(str(file))
    file.write_text('{"input": "", "context": "Text.", "answers": ["Sum."], "dataset": "hotpotqa"}\n')
    registry.from_file(str(file))
