"""`vllm serve` with the plugin, over HTTP: mixed requests, some given up in the middle, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from openai import AsyncOpenAI

from library import SETTINGS, library, prompt

PORT = 8437
PLAIN = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def metric(name: str) -> float:
    """The sum of a metric over the engine's labels."""
    lines = PLAIN.open(f"http://127.0.0.1:{PORT}/metrics", timeout=30).read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))


async def load(client: AsyncOpenAI, count: int) -> tuple[int, int]:
    """Requests of many lengths, eight at a time; every fifth is given up after a few tokens. How many ended, and were left."""
    draw, gate, ended, cancelled = random.Random(0), asyncio.Semaphore(8), 0, 0
    sizes = [(draw.randint(5, 900), draw.randint(2, 30)) for _ in range(count)]

    async def one(number: int) -> None:
        nonlocal ended, cancelled
        length, limit = sizes[number]
        async with gate:
            stream = await client.completions.create(
                model="tiny", prompt=prompt(length, number), max_tokens=limit, temperature=0, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            received = 0
            async for _ in stream:
                received += 1
                if number % 5 == 0 and received > limit // 2:
                    await stream.close()
                    cancelled += 1
                    return
            ended += 1

    await asyncio.gather(*(one(number) for number in range(count)))
    return ended, cancelled


def test_vllm_serve_answers_as_the_library_and_leaves_nothing_behind(folder: str, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", folder, "--host", "127.0.0.1", "--port", str(PORT),
        "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "4096", "--block-size", "32", "--enforce-eager",
        "--num-gpu-blocks-override", "64", "--max-num-batched-tokens", "256",
        "--additional-config", json.dumps({"keepkv": SETTINGS}),
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        until = time.time() + 400
        while True:
            try:
                PLAIN.open(f"http://127.0.0.1:{PORT}/health", timeout=2)
                break
            except OSError:
                assert process.poll() is None and time.time() < until, (tmp_path / "log").read_text()[-3000:]  # noqa: PT018
                time.sleep(1)
        client = AsyncOpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0, timeout=300)
        ids = prompt(1000)

        async def ask() -> list[float]:
            completion = await client.completions.create(
                model="tiny", prompt=ids, max_tokens=30, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
            )
            return completion.choices[0].logprobs.token_logprobs

        async def whole() -> tuple[list[float], tuple[int, int]]:
            return await ask(), await load(client, 60)

        chances, (ended, cancelled) = asyncio.run(whole())
        _, expected = library(folder, ids, 30)
        assert max(abs(a - b) for a, b in zip(chances, expected, strict=True)) < 1e-4
        assert (ended, cancelled) == (48, 12)
        until = time.time() + 30
        while metric("num_requests_running") + metric("kv_cache_usage_perc") and time.time() < until:
            time.sleep(0.5)
        assert metric("num_requests_running") == 0
        assert metric("num_requests_waiting") == 0
        assert metric("kv_cache_usage_perc") == 0
        print(f"{ended} ended, {cancelled} given up, {metric('num_preemptions_total'):.0f} preemptions, no page in use")
    finally:
        process.terminate()
        process.wait(60)
