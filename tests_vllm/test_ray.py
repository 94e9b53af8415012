"""Ray: documents compiled side by side with a worker killed in the middle, and the vLLM plugin under Ray Serve LLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("ray")

from keepkv.documents.batch import Compiler, Order, with_ray
from keepkv.recipe import Recipe

TEXT = "The quick brown fox jumps over the lazy dog, and the dog looks at the fox without getting up. " * 6


def test_a_worker_killed_in_the_middle_costs_no_document(folder: str, tmp_path: Path) -> None:
    import ray

    docs = []
    for number in range(8):
        docs.append(str(tmp_path / f"{number}.txt"))
        Path(docs[-1]).write_text(f"{number}. {TEXT}")
    docs.insert(3, str(tmp_path / "nowhere.txt"))
    targets = [Path(doc).with_suffix(".keep") for doc in docs]
    order = Order(Recipe("25%"), model=folder, device="cpu", resume=True)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    try:
        outcomes, killed = {}, 0
        for doc, facts in with_ray(docs, targets, order, workers=2):
            outcomes[doc] = facts
            if not killed:
                pids = subprocess.run(["pgrep", "-f", "ray::.*Map"], capture_output=True, text=True).stdout.split()
                assert pids, "no worker of Ray Data is running"
                os.kill(int(pids[0]), signal.SIGKILL)
                killed = int(pids[0])
        assert set(outcomes) == set(docs)
        assert "cannot be read" in outcomes.pop(docs[3])
        assert not list(tmp_path.glob("*.tmp*"))
        again = dict(with_ray(docs, targets, order, workers=2))
        assert [facts["made"] for doc, facts in again.items() if doc != docs[3]] == [False] * 8
    finally:
        ray.shutdown()
    here = Compiler(Order(Recipe("25%"), model=folder, device="cpu"))
    for doc, target in zip(docs, targets, strict=True):
        if doc != docs[3]:
            file_bytes = target.read_bytes()
            here.compile(doc, tmp_path / "here.keep")
            here_header, ray_header = (json.loads(_header(raw)) for raw in ((tmp_path / "here.keep").read_bytes(), file_bytes))
            assert here_header["tensors"] == ray_header["tensors"]


def _header(raw: bytes) -> str:
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size])["__metadata__"]["keepkv"]


PATIENT = {  # seconds; a busy machine takes longer than Ray expects
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "60",
}  # fmt: skip
APP = """
import json, sys
import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

folder, port, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
ray.init(num_cpus=16, include_dashboard=False, _node_ip_address="127.0.0.1", object_store_memory=200 * 2**20)
config = LLMConfig(
    model_loading_config=dict(model_id="tiny", model_source=folder), accelerator_type=None,
    placement_group_config={"bundles": [{"CPU": 1}]},
    deployment_config=dict(num_replicas=2, autoscaling_config=None),
    runtime_env=dict(env_vars={"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1",
                               "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}),
    engine_kwargs=dict(dtype="float32", max_model_len=4096, max_num_batched_tokens=256, num_gpu_blocks_override=48,
                       block_size=32, enforce_eager=True, additional_config=settings),
)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(build_openai_app({"llm_configs": [config]}), blocking=False)
print("READY", flush=True)
sys.stdin.read()
serve.shutdown()
"""


def test_ray_serve_llm_with_two_replicas(folder: str, tmp_path: Path) -> None:
    """A pool of 48 pages, in which stock vLLM does not start with this length (test_vllm.py), answers through Ray Serve."""
    pytest.importorskip("ray.serve.llm")
    from library import SETTINGS, library, prompt

    settings = {**SETTINGS, "method": "snapkv"}  # whose choices do not hang on ties

    app = tmp_path / "app.py"
    app.write_text(APP)
    args = [sys.executable, str(app), folder, "8419", json.dumps({"keepkv": settings})]
    environment = {**os.environ, "RAY_SERVE_ENABLE_HA_PROXY": "0", **PATIENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        until = time.time() + 540
        while "READY" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.time() < until, (tmp_path / "log").read_text()[-3000:]
            time.sleep(1)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for seed in range(4):
            ids = prompt(1000, seed)
            body = {"model": "tiny", "prompt": ids, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "logprobs": 0}
            request = urllib.request.Request(
                "http://127.0.0.1:8419/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
            )
            answer = json.load(opener.open(request, timeout=240))
            chances = answer["choices"][0]["logprobs"]["token_logprobs"]
            _, expected = library(folder, ids, 40, settings=settings)
            assert answer["usage"]["completion_tokens"] == 40
            assert max(abs(a - b) for a, b in zip(chances, expected, strict=True)) < 1e-4
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        subprocess.run([str(Path(sys.executable).parent / "ray"), "stop", "--force"], capture_output=True)
