"""docs/models.md: it has every type of transformers, and says of a covering part what is found today."""

from __future__ import annotations

import re
import runpy

import pytest
import transformers

from helpers import ROOT

TABLE = runpy.run_path(str(ROOT / "benchmarks" / "model_table.py"))
# All ways to rotate, mixtures of experts, chunks, hybrids, and every reason for a refusal.
COVERING = (
    "cohere2", "ernie4_5_moe", "glm4_moe", "gpt_neox", "llama4_text", "nanochat", "olmo3", "persimmon", "qwen3_moe", "smollm3",
    "fuyu", "bert", "deepseek_v3", "diffllama", "gemma3n_text", "gemma4_text", "gpt_oss", "jamba", "minimax_m3_vl_text", "blt",
    "gemma2", "qwen3_next", "falcon_h1", "nemotron_h", "mimo_v2_flash", "inkling_text", "ministral", "gptj",
)  # fmt: skip


def listed() -> dict[str, str]:
    """The status of every type on the page."""
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    status, found = "", {}
    for line in text.splitlines():
        if line.startswith("## "):
            status = line[3:].lower()
        elif match := re.match(r"\| `([^`]+)` \|", line):
            found[match[1]] = status
    return found


@pytest.mark.skipif(transformers.__version__ != "5.23.0", reason="the page is of transformers 5.23.0")
def test_the_page_has_every_type() -> None:
    statuses = listed()
    assert set(statuses) == set(TABLE["TYPES"])
    assert "wrong" not in statuses.values()


@pytest.mark.skipif(transformers.__version__ != "5.23.0", reason="the page is of transformers 5.23.0")
@pytest.mark.parametrize("kind", COVERING)
def test_the_page_says_what_is_found(kind: str) -> None:
    assert TABLE["survey"](kind).status == listed()[kind]
