"""Tasks from other benchmarks' files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from eval.drawn import draw
from keepkv.eval.tasks import registry

ROWS = {
    "squad": {"data": [{"paragraphs": [
        {"context": f"Mr Stone{i} lives in town {i}. " * 20,
         "qas": [{"question": f"Where is {i}?", "answers": [{"text": f"town {i}"}]}]} for i in range(9)]}]},
    "pairs": {"ordered_kv_records": [[f"k{i}", f"v{i}"] for i in range(9)], "key": "k3", "value": "v3"},
    "ruler": {"index": 0, "input": "Some text.\nMore text.\nWhat is the number? It is", "outputs": ["42"], "length": 9},
    "longbench": {"input": "Who?", "context": "Some text.", "answers": ["Ann"], "dataset": "hotpotqa", "length": 2},
    "gsm8k": {"question": "1 + 1?", "answer": "It is 2. #### 2"},
    "qmsum": {"meeting_transcripts": [{"speaker": "A", "content": "We sell."}],
              "general_query_list": [{"query": "Sum up.", "answer": "They sell."}], "specific_query_list": []},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_files_of_other_benchmarks_become_tasks(kind: str, tmp_path: Path) -> None:
    if kind == "qmsum":
        pytest.importorskip("rouge_score")
    file = tmp_path / f"{kind}.jsonl"
    row = ROWS[kind]
    other = json.loads(json.dumps(row).replace("42", "43").replace("Ann", "Bob").replace("They sell", "They buy"))
    file.write_text(json.dumps(row) if kind == "squad" else f"{json.dumps(row)}\n{json.dumps(other)}\n")
    task = registry.from_file(str(file))
    sample = task.make(draw(0, tokens=200))
    assert sample.questions[0].score(sample.questions[0].expected) == 1.0
    assert sample.questions[0].ask
    assert sample.questions[0].expected.strip('"') not in sample.questions[0].ask
    assert sample.questions[0].wrong or kind == "gsm8k"
    if kind == "ruler":
        assert sample.text == "Some text.\nMore text."


def test_real_data_if_it_is_there() -> None:
    folder = Path(os.environ.get("KEEPKV_DATA", ""))
    if not os.environ.get("KEEPKV_DATA"):
        pytest.skip("KEEPKV_DATA names no folder with the real samples")
    for file in (*folder.glob("xquad*.json"), *folder.glob("kv-retrieval*.jsonl.gz")):
        sample = registry.from_file(str(file)).make(draw(0, tokens=500))
        assert all(q.score(q.expected) == 1 and q.expected.strip('"') in sample.text for q in sample.questions)
