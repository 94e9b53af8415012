"""keepkv in lm-evaluation-harness, on a local task file. Runs where the harness is installed: pip install 'keepkv[lm-eval]'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'keepkv[lm-eval]'")
pytest.importorskip("accelerate", reason="the harness's own model needs accelerate")
pytestmark = pytest.mark.filterwarnings("default")
QUESTION = "The harbor is quiet. The baker likes the color {}. The sea is wide and the boats come home late. " * 3
CHOICE = """
task: keepkv_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}} The baker likes the color"
doc_to_choice: [red, blue, green]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
WRITE = """
task: keepkv_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}} The baker likes the color"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""


def test_the_full_cache_is_the_harness_own_model_and_a_budget_is_kept(folder: str, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from keepkv.eval.lm_eval_model import KeepKV

    file = tmp_path / "rows.jsonl"
    rows = [{"text": QUESTION.replace("{}", color), "answer": color} for color in ("red", "blue", "green")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(file=file))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def run(model: object) -> dict[str, list[object]]:
        found = simple_evaluate(
            model=model, tasks=["keepkv_choice", "keepkv_write"], task_manager=tasks, log_samples=True, bootstrap_iters=0
        )
        return {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}

    plain = run(HFLM(pretrained=folder, batch_size=1, device="cpu", dtype="float32"))
    full, small = KeepKV(folder, method="full", budget="100%", device="cuda:0"), KeepKV(folder, method="snapkv", budget="25%")
    ours, less = run(full), run(small)
    assert ours["keepkv_write"] == plain["keepkv_write"]
    for one, other in zip(ours["keepkv_choice"], plain["keepkv_choice"], strict=True):
        for (chance, greedy), (wanted, was_greedy) in zip((r[0] for r in one), (r[0] for r in other), strict=True):
            assert chance == pytest.approx(wanted, abs=1e-3)
            assert greedy == was_greedy
    assert less["keepkv_choice"] != ours["keepkv_choice"]
    assert full.kept
    assert set(full.kept) == {1.0}
    assert max(small.kept) < 0.3
