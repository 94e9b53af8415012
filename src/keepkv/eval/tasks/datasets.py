"""Local files of other benchmarks as tasks: SQuAD (XQuAD), key-value retrieval, RULER, LongBench, GSM8K, QMSum.

A file's format is recognized by the fields of its first row. Questions come after the compression, whatever the file's own
prompt does.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keepkv.errors import InputError
from keepkv.eval import metrics
from keepkv.eval.sample import Draw, Question, Sample, Score
from keepkv.eval.tasks.synthetic import among_pairs

DatasetRow = dict[str, Any]


@dataclass(frozen=True)
class DatasetFormat:
    """The format of a benchmark's files.

    Args:
        name: What it is called.
        source: The paper that it comes from.
        fields: What its rows have.
        make: Draws a sample from the rows; `Draw.number` says which one.
        sized: Whether its texts have the length that is asked for.
        scores: What scores the answers of these rows, where it needs more than keepkv.
    """

    name: str
    source: str
    fields: frozenset[str]
    make: Callable[[Draw, Sequence[DatasetRow]], Sample]
    sized: bool = False
    scores: Callable[[Sequence[DatasetRow]], Iterable[Callable[..., Score]]] = lambda rows: ()


def rows(place: str) -> list[DatasetRow]:
    """The rows of a data set.

    Args:
        place: A .json or .jsonl file, also with .gz, or hf:OWNER/NAME[:CONFIG[:SPLIT]] for one on the Hugging Face Hub. The
            Hub needs the package `datasets` and a network.

    Raises:
        InputError: for what cannot be read or has no rows.
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
        raise InputError(f"{place!r} is not UTF-8 text (byte {error.start}): expected a .json or .jsonl file") from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = [_row(place, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    items = content.get("data", [content]) if isinstance(content, dict) else content
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise InputError(f"{place!r} holds no rows: expected a list of JSON objects, or one on each line")
    return items


def _row(place: str, number: int, line: str) -> DatasetRow:
    try:
        row: DatasetRow = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{place!r} line {number} is not JSON ({error.msg}): expected a list of JSON objects, or one on each line"
        ) from None
    return row


def _hub(name: str, config: str = "", split: str = "test") -> list[DatasetRow]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"hf:{name} needs the package datasets: pip install datasets, or give a local file") from None
    try:
        return [dict(row) for row in load_dataset(name, config or None, split=split)]
    except Exception as error:  # whatever the Hub and its scripts may raise
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise InputError(f"hf:{name} cannot be loaded ({reason}): check name and network, or give a local file") from error


def format_of(place: str, rows: Sequence[DatasetRow]) -> DatasetFormat:
    """The format of these rows. Raises InputError if it is none of the known ones."""
    for kind in FORMATS:
        if kind.fields <= set(rows[0]):
            return kind
    known = "; ".join(f"{kind.name} ({', '.join(sorted(kind.fields))})" for kind in FORMATS)
    raise InputError(f"{place!r} has rows with {', '.join(sorted(rows[0]))}: expected the fields of one of {known}")


def _mixed(draw: Draw, question: Question, pool: Sequence[str]) -> Question:
    """The question with three other answers of the same file as wrong ones, none of them fully right."""
    others = sorted({answer for answer in pool if answer and question.score(answer) < 1})
    return replace(question, wrong=tuple(draw.rng.sample(others, min(3, len(others)))))


def squad(draw: Draw, rows: Sequence[DatasetRow]) -> Sample:
    """Consecutive paragraphs of the articles up to the length, and six of the questions about them (arXiv 1606.05250).

    The score is whether a right answer occurs (as RULER's qa); F1 and exact match are recorded beside it.
    """
    text_paragraphs: list[DatasetRow] = []
    total = 0
    paragraphs = [paragraph for article in rows for paragraph in _paragraphs(article)]
    start = draw.rng.randrange(len(paragraphs))
    for paragraph in [*paragraphs[start:], *paragraphs[:start]]:
        if total and total >= draw.tokens:
            break
        text_paragraphs.append(paragraph)
        total += draw.prose.count(paragraph["context"])
    if total < draw.tokens:
        raise InputError(
            f"the articles have about {total:,} tokens, fewer than the {draw.tokens:,} wanted: give smaller --lengths"
        )
    answerable = [qa for paragraph in text_paragraphs for qa in paragraph["qas"] if qa["answers"]]
    pool = [qa["answers"][0]["text"] for qa in answerable]
    questions = []
    for qa in draw.rng.sample(answerable, min(6, len(answerable))):
        right = [answer["text"] for answer in qa["answers"]]
        more = {"f1": metrics.f1(*right), "exact": metrics.exact(*right)}
        questions.append(_mixed(draw, Question(qa["question"], right[0], metrics.any_of(*right), more=more), pool))
    return Sample("\n\n".join(paragraph["context"] for paragraph in text_paragraphs), tuple(questions))


def _paragraphs(article: DatasetRow) -> Iterator[DatasetRow]:
    if "paragraphs" in article:
        yield from article["paragraphs"]
        return
    answers = [{"text": text} for text in article["answers"]["text"]]  # one row a question, as `datasets` has it
    yield {"context": article["context"], "qas": [{"question": article["question"], "answers": answers}]}


def pairs(draw: Draw, rows: Sequence[DatasetRow]) -> Sample:
    """UUID keys and values, one of which is asked (Lost in the Middle, arXiv 2307.03172)."""
    row = rows[draw.number]
    table = [(key, value) for key, value in row["ordered_kv_records"]]
    return among_pairs(draw, table, [[key for key, _ in table].index(row["key"])])


def ruler(draw: Draw, rows: Sequence[DatasetRow]) -> Sample:
    """A row of RULER's own files (arXiv 2404.06654): what stands before the input's last line is the text."""
    row = rows[draw.number]
    text, _, ask = row["input"].strip().rpartition("\n")
    score = (metrics.any_of if "answer the question" in text.lower() else metrics.all_of)(*row["outputs"])
    question = Question(ask + row.get("answer_prefix", ""), ", ".join(row["outputs"]), score)
    return Sample(text, (_mixed(draw, question, [", ".join(other["outputs"]) for other in rows]),))


LONGBENCH: dict[str, Callable[..., Score]] = {
    **dict.fromkeys(("gov_report", "multi_news", "qmsum", "samsum", "vcsum", "dureader"), metrics.rouge_l),
    **dict.fromkeys(("trec", "lsht"), metrics.any_of),
    **dict.fromkeys(("passage_count", "passage_retrieval_en", "passage_retrieval_zh"), metrics.numbers),
    **dict.fromkeys(("lcc", "repobench-p"), metrics.code_similarity),
}


def longbench(draw: Draw, rows: Sequence[DatasetRow]) -> Sample:
    """A row of LongBench (arXiv 2308.14508), scored as its data set is: F1, ROUGE-L, class, number or similarity of code."""
    row = rows[draw.number]
    (measure,) = longbench_scores([row])
    request = "Write the next line of code." if measure is metrics.code_similarity else "Write a summary of the text above."
    question = Question(row["input"].strip() or request, row["answers"][0], measure(*row["answers"]))
    return Sample(row["context"], (_mixed(draw, question, [other["answers"][0] for other in rows]),))


def longbench_scores(rows: Sequence[DatasetRow]) -> set[Callable[..., Score]]:
    """What LongBench scores the data sets of these rows by."""
    return {LONGBENCH.get(row["dataset"].removesuffix("_e"), metrics.f1) for row in rows}


def gsm8k(draw: Draw, rows: Sequence[DatasetRow]) -> Sample:
    """Worked problems up to the length, then another one; its last number is scored (arXiv 2110.14168)."""
    order = draw.rng.sample(range(len(rows)), len(rows))
    order.remove(draw.number)
    examples: list[str] = []
    total = 0
    for i in order:
        examples.append(f"Question: {rows[i]['question']}\nAnswer: {_solution(rows[i])}")
        total += draw.prose.count(examples[-1])
        if total >= draw.tokens:
            break
    row = rows[draw.number]
    right = row["answer"].rpartition("####")[2].strip()
    question = Question(f"{row['question']} Solve it in the same way.", _solution(row), metrics.last_number(right))
    return Sample("\n\n".join(examples), (_mixed(draw, question, [_solution(other) for other in rows]),))


def _solution(row: DatasetRow) -> str:
    steps, _, right = row["answer"].rpartition("####")
    return f"{steps.strip()} The answer is {right.strip()}"


def qmsum(draw: Draw, rows: Sequence[DatasetRow]) -> Sample:
    """A meeting, and what is asked about it; ROUGE-L (arXiv 2104.05938)."""
    row = rows[draw.number]
    pool = [query["answer"] for other in rows for query in _queries(other)]
    text = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"])
    questions = (Question(query["query"], query["answer"], metrics.rouge_l(query["answer"])) for query in _queries(row))
    return Sample(text, tuple(_mixed(draw, question, pool) for question in questions))


def _queries(row: DatasetRow) -> list[DatasetRow]:
    return [*row.get("general_query_list", []), *row.get("specific_query_list", [])]


LONGBENCH_FIELDS = frozenset({"input", "context", "answers", "dataset"})
FORMATS = (
    DatasetFormat("squad", "SQuAD, arXiv 1606.05250; XQuAD, arXiv 1910.11856", frozenset({"paragraphs"}), squad, sized=True),
    DatasetFormat("pairs", "Lost in the Middle, arXiv 2307.03172", frozenset({"ordered_kv_records", "key", "value"}), pairs),
    DatasetFormat("longbench", "LongBench, arXiv 2308.14508", LONGBENCH_FIELDS, longbench, scores=longbench_scores),
    DatasetFormat("ruler", "RULER, arXiv 2404.06654", frozenset({"input", "outputs"}), ruler),
    DatasetFormat(
        "qmsum", "QMSum, arXiv 2104.05938", frozenset({"meeting_transcripts"}), qmsum, scores=lambda rows: [metrics.rouge_l]
    ),
    DatasetFormat("squad", "SQuAD, one row a question", frozenset({"context", "question", "answers"}), squad, sized=True),
    DatasetFormat("gsm8k", "GSM8K, arXiv 2110.14168", frozenset({"question", "answer"}), gsm8k, sized=True),
)
