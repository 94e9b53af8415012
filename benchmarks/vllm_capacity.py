"""vLLM with and without keepkv: the same pool of pages, the same requests. Run in the environment of `make test-vllm`.

    .venv-vllm-0.32.0/bin/python benchmarks/vllm_capacity.py --text book.txt --json capacity.json

Each variant is a process of its own; variants are run in turn, `--rounds` times. Stock vLLM is given the longest model length
that it accepts for the pool, keepkv its own. Prints requests running at once, seconds to the first token and to the end
(medians), tokens written per second in all, most pages of a request, preemptions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from keepkv.models import smollm2

BLOCK = 32


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.json"
        command = [sys.executable, str(Path(__file__).with_name("vllm_engine.py")), str(output)]
        process = subprocess.run(command, input=json.dumps(spec), capture_output=True, text=True)
        if process.returncode:
            raise SystemExit(process.stderr[-3000:])
        report = json.loads(output.read_text())
    requests, steps = report["requests"], report["steps"]
    tokens_written = sum(len(request["tokens"]) for request in requests)
    return {
        "running": max(step["running"] for step in steps),
        "first": statistics.median(request["first"] for request in requests),
        "end": statistics.median(request["end"] for request in requests),
        "tokens_per_second": tokens_written / report["seconds"],
        "seconds": report["seconds"],
        "pages_of_a_request": max(request["pages"] for request in requests),
        "most_pages": max(step["pages"] for step in steps),
        "preempted": sum(request["preempted"] for request in requests),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="prompts are stretches of it")
    parser.add_argument("--model", default=None, help="a folder; default: the embedded model")
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1500, help="of a prompt")
    parser.add_argument("--write", type=int, default=100, help="tokens that each request writes")
    parser.add_argument("--pages", type=int, default=64, help=f"of {BLOCK} tokens, in the pool")
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--step", type=int, default=512)
    parser.add_argument("--methods", default="keepkv,snapkv")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = args.model or str(smollm2.path())
    os.environ.update(
        HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="2", VLLM_HOST_IP="127.0.0.1", VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="ERROR",
    )  # fmt: skip
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(args.text.read_text(), verbose=False)["input_ids"]
    starts = [i * (len(ids) - args.tokens) // max(1, args.requests - 1) for i in range(args.requests)]
    requests = [{"ids": ids[start : start + args.tokens], "tokens": args.write} for start in starts]
    engine = {
        "dtype": "float32", "max_num_batched_tokens": 256, "block_size": BLOCK, "num_gpu_blocks_override": args.pages,
        "enforce_eager": True, "skip_tokenizer_init": True, "enable_prefix_caching": False,
    }  # fmt: skip
    settings = {"budget": args.budget, "window": 64, "step": args.step, "references": 128}
    variants: dict[str, dict[str, Any]] = {"stock": {**engine, "max_model_len": (args.pages - 1) * BLOCK}}
    for method in args.methods.split(","):
        engine_settings = {"keepkv": {**settings, "method": method}}
        variants[method] = {**engine, "max_model_len": 8192, "additional_config": engine_settings}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name, engine_settings in variants.items():
            results[name].append(measure({"model": folder, "engine": engine_settings, "requests": requests}))
            print(name, {key: round(value, 2) for key, value in results[name][-1].items()}, file=sys.stderr)
    record = {
        "vllm": version("vllm"), "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "model": Path(folder).name, "settings": settings, "pages": args.pages, "block": BLOCK, "requests": args.requests,
        "tokens": args.tokens, "write": args.write, "found": results,
    }  # fmt: skip
    names = list(results["stock"][0])
    print(f"{'':20}{''.join(f'{name:>12}' for name in results)}")
    for key in names:
        medians = [statistics.median(result[key] for result in rounds) for rounds in results.values()]
        print(f"{key:20}{''.join(f'{value:12.2f}' for value in medians)}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
