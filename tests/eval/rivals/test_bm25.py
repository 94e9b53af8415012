"""bm25: passages are whole and fit, the ranking is BM25's, and an answer comes from the best passages alone."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from helpers import LOG
from keepkv import KeepCache, methods
from keepkv.eval import plan
from keepkv.eval.config import Config
from keepkv.eval.measure import Setup
from keepkv.eval.rivals.bm25 import best_passages, full_bytes, split_into_passages
from keepkv.eval.run import measured
from keepkv.eval.tasks import registry
from keepkv.models import loading

bm25s = pytest.importorskip("bm25s", reason="pip install 'keepkv[eval]'")
TEXT = " ".join(LOG.read_text().split())


def count(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(("budget", "least", "most"), [(1000, 64, 128), (200, 50, 100), (40, 10, 20), (10, 2, 5)])
def test_passages_are_whole_sentences_and_the_whole_text(budget: int, least: int, most: int) -> None:
    passages = split_into_passages(TEXT, count, budget)
    assert " ".join(passages) == TEXT
    assert all(passage[-1] in ".!?" for passage in passages[:-1])
    for passage in passages[:-1]:
        sentences = re.split(r"(?<=[.!?])\s+", passage)
        assert count(passage) <= most or len(sentences) == 1
    assert sum(count(passage) >= least for passage in passages) > len(passages) / 2


def brute_force(passages: list[str], question: str) -> list[float]:
    """Lucene's BM25 as it is defined, k1 = 1.5 and b = .75, without stop words."""
    stop = set(bm25s.stopwords.STOPWORDS_EN)
    words = [[w for w in re.findall(r"\b\w\w+\b", text.lower()) if w not in stop] for text in [*passages, question]]
    *documents, query = words
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in set(query):
            df = sum(word in other for other in documents)
            tf = document.count(word)
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            score += query.count(word) * idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("question", ["What is the call sign of the Halcyon?", "Who brought the microscope?", "Qqq zzz?"])
def test_the_best_passages_that_fit_stand_in_the_texts_order(question: str) -> None:
    passages = split_into_passages(TEXT, count, 200)
    scores = brute_force(passages, question)
    for budget in (60, 150, 400):
        left, expected = budget, []
        for i in sorted(range(len(passages)), key=lambda i: (-round(scores[i], 4), i)):
            if count(passages[i]) <= left:
                left -= count(passages[i])
                expected.append(i)
        found = best_passages(passages, question, count, budget)
        assert found == [passages[i] for i in sorted(expected)]
        assert sum(map(count, found)) <= budget
    (short,) = best_passages(passages, question, count, 5)
    assert count(short) == 5, "nothing fits: the beginning of the best passage"
    assert passages[max(range(len(passages)), key=lambda i: (round(scores[i], 4), -i))].startswith(short)


def test_a_run_reads_a_tenth_as_text_and_says_what_it_takes(folder: str) -> None:
    config = Config(models=(folder,), haystack=str(LOG), methods=("snapkv", "bm25"), budgets=("10%",), tasks=("facts",))
    setup = Setup(*loading.load(folder, "cpu", "auto"), config)
    job = plan.Job("tiny", "facts", 1200, 0, tuple(plan.variants(config)))
    full, snapkv, bm25 = measured(setup, job)
    assert [group[0].method for group in (full, snapkv, bm25)] == ["full", "snapkv", "bm25"]
    assert not any(record.failed for record in bm25)
    for ours, truth in zip(bm25, full, strict=True):
        assert (ours.prompt, ours.text, ours.tokens, ours.kv_bytes_full) == (
            truth.prompt, truth.text, truth.tokens, truth.kv_bytes_full,
        )  # fmt: skip
        assert 0.05 < ours.kv_bytes / ours.kv_bytes_full <= 0.1
        assert ours.kv_bytes == full_bytes(setup, int(ours.slots))
    cache = KeepCache(setup.model, "100%", methods.get("full"))
    setup.model(setup.tokens("x" * 40), past_key_values=cache)
    assert cache.report().kv_bytes == full_bytes(setup, 40)
    assert {record.slots for record in bm25} != {bm25[0].slots} or len(bm25) == 1, "every question has its own passages"


def test_it_is_not_in_the_plan_where_there_is_no_question() -> None:
    config = Config(methods=("snapkv", "bm25"), budgets=("10%", "5%"), slot_dtypes=("float", "int8"))
    for name, asks in (("needle", True), ("facts", True), ("fidelity", False), ("drift", False), ("turns", False)):
        found = [variant for variant in plan.variants(config, registry.TASKS[name]) if variant.method == "bm25"]
        assert found == ([plan.Variant("bm25", "10%"), plan.Variant("bm25", "5%")] if asks else []), name


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from keepkv.errors import InputError
    from keepkv.eval.run import settled

    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InputError, match=r"pip install 'keepkv\[eval\]'"):
        settled(Config(methods=("bm25",), haystack=str(LOG)))
    settled(Config(methods=("snapkv",), haystack=str(LOG)))
