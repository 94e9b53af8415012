"""Local files of other benchmarks as tasks: SQuAD (XQuAD), key-value retrieval, RULER, LongBench, GSM8K, QMSum.

The format is told by the fields of the first row. Questions come after the compression, whatever the file's own prompt does.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keepkv.errors import InputError
from keepkv.eval import metrics
from keepkv.eval.sample import Draw, Question, Sample, Score
from keepkv.eval.tasks.synthetic import among_pairs

Row = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """A kind of file. fields: what its rows have; make(draw, rows): the number-th sample; sized: of the length asked for."""

    name: str
    source: str
    fields: frozenset[str]
    make: Callable[[Draw, Sequence[Row]], Sample]
    sized: bool = False


def rows(place: str) -> list[Row]:
    """The rows of a .json or .jsonl file, also .gz, or, as hf:OWNER/NAME[:CONFIG[:SPLIT]], of a data set on the Hub.

    Raises InputError for what is missing or is neither; the Hub needs the package `datasets` and a network.
    """
    if place.startswith("hf:"):
        return _hub(*place.removeprefix("hf:").split(":"))
    path = Path(place)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{place!r} cannot be read ({error.strerror or error}): expected a .json or .jsonl file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{place!r} is not UTF-8 text (byte {error.start})") from error
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        whole = [_row(place, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    found = whole.get("data", [whole]) if isinstance(whole, dict) else whole
    if not isinstance(found, list) or not found or not all(isinstance(row, dict) for row in found):
        raise InputError(f"{place!r} holds no rows: expected a list of JSON objects, or one a line")
    return found


def _row(place: str, number: int, line: str) -> Row:
    try:
        row: Row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place!r} line {number} is not JSON: {error.msg}") from None
    return row


def _hub(name: str, config: str = "", split: str = "test") -> list[Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"hf:{name} needs the package datasets: pip install datasets, or give a file") from None
    try:
        return [dict(row) for row in load_dataset(name, config or None, split=split)]
    except Exception as error:  # whatever the Hub and its scripts may raise
        raise InputError(f"hf:{name} cannot be loaded: {str(error).splitlines()[0] if str(error) else error!r}") from error


def understood(place: str, found: Sequence[Row]) -> Format:
    """The format of these rows. Raises InputError if it is none of the known ones."""
    for kind in FORMATS:
        if kind.fields <= set(found[0]):
            return kind
    known = "; ".join(f"{kind.name} ({', '.join(sorted(kind.fields))})" for kind in FORMATS)
    raise InputError(f"{place!r} has rows with {', '.join(sorted(found[0]))}: expected the fields of one of {known}")


def _mixed(draw: Draw, question: Question, pool: Sequence[str]) -> Question:
    """The question with three other answers of the same file, none of them fully right, to choose among."""
    others = sorted({answer for answer in pool if answer and question.score(answer) < 1})
    return replace(question, wrong=tuple(draw.rng.sample(others, min(3, len(others)))))


def squad(draw: Draw, found: Sequence[Row]) -> Sample:
    """Consecutive paragraphs of the articles up to the length, and six of the questions about them (arXiv 1606.05250).

    The score is whether a right answer occurs (as RULER's qa); F1 and exact match are recorded beside it.
    """
    chosen, have = [], 0
    paragraphs = [paragraph for article in found for paragraph in _paragraphs(article)]
    start = draw.rng.randrange(len(paragraphs))
    for paragraph in [*paragraphs[start:], *paragraphs[:start]]:
        if have and have >= draw.tokens:
            break
        chosen.append(paragraph)
        have += draw.prose.count(paragraph["context"])
    if have < draw.tokens:
        raise InputError(f"the articles have about {have:,} tokens, fewer than the {draw.tokens:,} wanted: a smaller --lengths")
    asked = [qa for paragraph in chosen for qa in paragraph["qas"] if qa["answers"]]
    pool = [qa["answers"][0]["text"] for qa in asked]
    questions = []
    for qa in draw.rng.sample(asked, min(6, len(asked))):
        right = [answer["text"] for answer in qa["answers"]]
        more = {"f1": metrics.f1(*right), "exact": metrics.exact(*right)}
        questions.append(_mixed(draw, Question(qa["question"], right[0], metrics.any_of(*right), more=more), pool))
    return Sample("\n\n".join(paragraph["context"] for paragraph in chosen), tuple(questions))


def _paragraphs(article: Row) -> Iterator[Row]:
    if "paragraphs" in article:
        yield from article["paragraphs"]
        return
    answers = [{"text": text} for text in article["answers"]["text"]]  # one row a question, as `datasets` has it
    yield {"context": article["context"], "qas": [{"question": article["question"], "answers": answers}]}


def pairs(draw: Draw, found: Sequence[Row]) -> Sample:
    """UUID keys and values, one of which is asked (Lost in the Middle, arXiv 2307.03172)."""
    row = found[draw.number]
    table = [(key, value) for key, value in row["ordered_kv_records"]]
    return among_pairs(draw, table, [[key for key, _ in table].index(row["key"])])


def ruler(draw: Draw, found: Sequence[Row]) -> Sample:
    """A row of RULER's own files (arXiv 2404.06654): what stands before the input's last line is the text."""
    row = found[draw.number]
    text, _, ask = row["input"].strip().rpartition("\n")
    score = (metrics.any_of if "answer the question" in text.lower() else metrics.all_of)(*row["outputs"])
    question = Question(ask + row.get("answer_prefix", ""), ", ".join(row["outputs"]), score)
    return Sample(text, (_mixed(draw, question, [", ".join(other["outputs"]) for other in found]),))


LONGBENCH: dict[str, Callable[..., Score]] = {
    **dict.fromkeys(("gov_report", "multi_news", "qmsum", "samsum", "vcsum", "dureader"), metrics.rouge_l),
    **dict.fromkeys(("trec", "lsht"), metrics.any_of),
    **dict.fromkeys(("passage_count", "passage_retrieval_en", "passage_retrieval_zh"), metrics.numbers),
    **dict.fromkeys(("lcc", "repobench-p"), metrics.alike),
}


def longbench(draw: Draw, found: Sequence[Row]) -> Sample:
    """A row of LongBench (arXiv 2308.14508), scored as its data set is: F1, ROUGE-L, class, number or likeness of code."""
    row = found[draw.number]
    measure = LONGBENCH.get(row["dataset"].removesuffix("_e"), metrics.f1)
    nothing = "Write the next line of code." if measure is metrics.alike else "Write a summary of the text above."
    question = Question(row["input"].strip() or nothing, row["answers"][0], measure(*row["answers"]))
    return Sample(row["context"], (_mixed(draw, question, [other["answers"][0] for other in found]),))


def gsm8k(draw: Draw, found: Sequence[Row]) -> Sample:
    """Worked problems up to the length, then another one; its last number is scored (arXiv 2110.14168)."""
    order = draw.rng.sample(range(len(found)), len(found))
    order.remove(draw.number)
    shown, have = [], 0
    for i in order:
        shown.append(f"Question: {found[i]['question']}\nAnswer: {_solution(found[i])}")
        have += draw.prose.count(shown[-1])
        if have >= draw.tokens:
            break
    row = found[draw.number]
    right = row["answer"].rpartition("####")[2].strip()
    question = Question(f"{row['question']} Solve it in the same way.", _solution(row), metrics.last_number(right))
    return Sample("\n\n".join(shown), (_mixed(draw, question, [_solution(other) for other in found]),))


def _solution(row: Row) -> str:
    worked, _, right = row["answer"].rpartition("####")
    return f"{worked.strip()} The answer is {right.strip()}"


def qmsum(draw: Draw, found: Sequence[Row]) -> Sample:
    """A meeting, and what is asked about it; ROUGE-L (arXiv 2104.05938)."""
    row = found[draw.number]
    pool = [query["answer"] for other in found for query in _queries(other)]
    text = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"])
    asked = (Question(query["query"], query["answer"], metrics.rouge_l(query["answer"])) for query in _queries(row))
    return Sample(text, tuple(_mixed(draw, question, pool) for question in asked))


def _queries(row: Row) -> list[Row]:
    return [*row.get("general_query_list", []), *row.get("specific_query_list", [])]


FORMATS = (
    Format("squad", "SQuAD, arXiv 1606.05250; XQuAD, arXiv 1910.11856", frozenset({"paragraphs"}), squad, sized=True),
    Format("pairs", "Lost in the Middle, arXiv 2307.03172", frozenset({"ordered_kv_records", "key", "value"}), pairs),
    Format("longbench", "LongBench, arXiv 2308.14508", frozenset({"input", "context", "answers", "dataset"}), longbench),
    Format("ruler", "RULER, arXiv 2404.06654", frozenset({"input", "outputs"}), ruler),
    Format("qmsum", "QMSum, arXiv 2104.05938", frozenset({"meeting_transcripts"}), qmsum),
    Format("squad", "SQuAD, one row a question", frozenset({"context", "question", "answers"}), squad, sized=True),
    Format("gsm8k", "GSM8K, arXiv 2110.14168", frozenset({"question", "answer"}), gsm8k, sized=True),
)
