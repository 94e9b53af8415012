"""keepkv inside vLLM on its CPU platform: the library's own answers, the pages that are really held, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from library import SETTINGS, library, prompt

ENGINE = Path(__file__).parents[1] / "benchmarks" / "vllm_engine.py"
BLOCK = 32


def serve(
    folder: str, tmp_path: Path, requests: list[dict[str, Any]], settings: Any = SETTINGS, backend: str = "", **changes: Any
) -> Any:  # fmt: skip
    """Runs an engine; returns what it reports, or what it said if it did not start."""
    engine = {
        "dtype": "float32", "max_model_len": 4096, "max_num_batched_tokens": 256, "block_size": BLOCK,
        "num_gpu_blocks_override": 80, "enforce_eager": True, "skip_tokenizer_init": True, **changes,
    }  # fmt: skip
    if settings:
        engine["additional_config"] = {"keepkv": settings}
    output = tmp_path / "out.json"
    backend_entry = {"backend": backend} if backend else {}
    spec = json.dumps({"model": folder, "engine": engine, "requests": requests, **backend_entry})
    bind = "0|1" if changes.get("tensor_parallel_size") == 2 else "nobind"
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": bind}
    command = [sys.executable, str(ENGINE), str(output)]
    process = subprocess.run(command, input=spec, capture_output=True, text=True, env=environment)
    return json.loads(output.read_text()) if process.returncode == 0 else process.stderr + process.stdout


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("keepkv", {}),
        ("keepkv", {"tensor_parallel_size": 2}),
        ("keepkv", {"enforce_eager": False}),
        ("keepkv", {"tensor_parallel_size": 2, "enforce_eager": False}),
        ("keepkv-exact", {}),
        ("snapkv", {}),
        ("streaming", {}),
    ],
)
def test_greedy_output_is_the_librarys_own(folder: str, tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    ids, settings = prompt(1500), {**SETTINGS, "method": method}
    report = serve(folder, tmp_path, [{"ids": ids, "tokens": 400}], settings, **changes)
    assert isinstance(report, dict), report[-3000:]
    (request,) = report["requests"]
    tokens, chances = library(folder, ids, 400, settings=settings)
    worst = max(abs(a - b) for a, b in zip(request["logprobs"], chances, strict=True))
    print(f"{method} {changes}: largest difference of a log-probability {worst:.1e}; pages held {request['pages']}")
    assert request["tokens"] == tokens
    assert worst < 1e-4
    assert request["pages"] <= (128 + 64 + 128 + 256) // BLOCK + 1
    pages = [step["pages"] for step in report["steps"][10:-3]]
    assert max(pages) <= (128 + 64 + 128) // BLOCK + 1
    assert report["left"] == 0
    assert report["free_after"] == report["free_before"]


def test_bfloat16(folder: str, tmp_path: Path) -> None:
    """The library's answers to that precision's rounding: the first token's likelihood, before greedy choices part."""
    ids = prompt(1000)
    report = serve(folder, tmp_path, [{"ids": ids, "tokens": 60}], dtype="bfloat16")
    assert isinstance(report, dict), report[-3000:]
    (request,), (_, chances) = report["requests"], library(folder, ids, 1)
    assert len(request["tokens"]) == 60
    assert abs(request["logprobs"][0] - chances[0]) < 0.1
    assert report["free_after"] == report["free_before"]


def test_the_backend_for_other_devices_is_the_librarys_own_too(folder: str, hybrid: str, tmp_path: Path) -> None:
    """On a CPU, in the place of the CPU's: all but the device itself is what runs on a GPU."""
    ids, name = prompt(1000), "keepkv.serving.vllm.backend.KeepBackend"
    report = serve(folder, tmp_path, [{"ids": ids, "tokens": 150}], backend=name)
    assert isinstance(report, dict), report[-3000:]
    tokens, chances = library(folder, ids, 150)
    assert report["requests"][0]["tokens"] == tokens
    assert max(abs(a - b) for a, b in zip(report["requests"][0]["logprobs"], chances, strict=True)) < 1e-4
    assert "sliding windows" in serve(hybrid, tmp_path, [{"ids": ids, "tokens": 2}], backend=name)
    assert "no settings" in serve(folder, tmp_path, [{"ids": ids, "tokens": 2}], settings=None, backend=name)


@pytest.mark.parametrize("method", ["snapkv", "keepkv-exact"])
def test_sliding_windows_are_left_as_they_are(hybrid: str, tmp_path: Path, method: str) -> None:
    """Not the default: what it leaves out hangs on ties here, and weights that differ by 1e-7 change its answer by 2e-3."""
    ids, settings = prompt(900), {**SETTINGS, "method": method}
    report = serve(hybrid, tmp_path, [{"ids": ids, "tokens": 100}], settings, num_gpu_blocks_override=120)
    assert isinstance(report, dict), report[-3000:]
    tokens, chances = library(hybrid, ids, 100, settings=settings)
    assert report["requests"][0]["tokens"] == tokens
    assert max(abs(a - b) for a, b in zip(report["requests"][0]["logprobs"], chances, strict=True)) < 1e-4
    assert report["free_after"] == report["free_before"]


def test_a_pool_too_small_for_stock_vllm_serves_four_at_once(folder: str, tmp_path: Path) -> None:
    requests = [{"ids": prompt(1500, seed), "tokens": 100} for seed in range(4)]
    stock = serve(folder, tmp_path, requests, settings=None, num_gpu_blocks_override=48)
    assert "KV cache" in stock
    report = serve(folder, tmp_path, requests, num_gpu_blocks_override=48)
    assert isinstance(report, dict), report[-3000:]
    assert max(step["running"] for step in report["steps"]) == 4
    for seed, request in enumerate(report["requests"]):
        assert len(request["tokens"]) == 100
        assert request["preempted"] == 0, seed


def test_many_requests_of_which_some_are_cancelled_leave_no_page_behind(folder: str, tmp_path: Path) -> None:
    """Preemption included: the pool holds fewer than the engine lets run."""
    draw = torch.Generator().manual_seed(0)
    requests = []
    for index in range(200):
        length, count, wait = (int(torch.randint(lo, hi, (), generator=draw)) for lo, hi in ((5, 700), (2, 40), (0, 6)))
        requests.append({"ids": prompt(length, index), "tokens": count, "arrive": index * 3 + wait})
        if index % 5 == 0:
            requests[-1]["cancel"] = 1 + count // 2
    report = serve(folder, tmp_path, requests, num_gpu_blocks_override=48)
    assert isinstance(report, dict), report[-3000:]
    assert report["left"] == 0
    assert report["free_after"] == report["free_before"]
    for spec, request in zip(requests, report["requests"], strict=True):
        assert len(request["tokens"]) == spec["tokens"] or len(request["tokens"]) >= spec.get("cancel", 10**9)


def test_a_preempted_request_goes_on_as_if_nothing_had_happened(folder: str, tmp_path: Path) -> None:
    """Short prompts that all fit and long answers that do not; until the first compression they are as if alone."""
    requests = [{"ids": prompt(40, seed), "tokens": 300} for seed in range(5)]
    report = serve(folder, tmp_path, requests, num_gpu_blocks_override=30)
    assert isinstance(report, dict), report[-3000:]
    assert sum(request["preempted"] for request in report["requests"]) > 0
    assert report["free_after"] == report["free_before"]
    for spec, request in zip(requests, report["requests"], strict=True):
        assert len(request["tokens"]) == 300
        tokens, _ = library(folder, spec["ids"], 250)
        assert request["tokens"][:250] == tokens


def test_without_settings_vllm_is_what_it_was(folder: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = prompt(300)
    report = serve(folder, tmp_path, [{"ids": ids, "tokens": 20}], settings=None, max_model_len=1024)
    assert isinstance(report, dict), report[-3000:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=2)
    assert report["requests"][0]["tokens"] == expected[0, 300:].tolist()
    assert report["requests"][0]["pages"] == 10


@pytest.mark.parametrize(
    ("settings", "changes", "says"),
    [
        ({"budget": 100}, {}, "multiple of the block size"),
        ({"budgets": 128}, {}, "did you mean"),
        ({"method": "kvzip"}, {}, "repeated"),
        (SETTINGS, {"kv_cache_dtype": "fp8"}, "quantized"),
        (
            SETTINGS,
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative",
        ),
        (SETTINGS, {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "connector"),
    ],
)
def test_what_cannot_be_served_is_refused(
    folder: str, tmp_path: Path, settings: Any, changes: dict[str, Any], says: str
) -> None:
    message = serve(folder, tmp_path, [{"ids": prompt(20), "tokens": 2}], settings, **changes)
    assert isinstance(message, str)
    assert says in message, message[-2000:]
