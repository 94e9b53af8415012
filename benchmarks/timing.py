"""What every benchmark here shares: variants in turn, medians with their spread, and a record of where it was measured."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import keepkv


def interleaved(rounds: int, variants: dict[str, Callable[[], float]], warmup: int = 1) -> dict[str, list[float]]:
    """Each round runs every variant once, in turn; the first `warmup` rounds are thrown away."""
    results: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + warmup):
        for name, run in variants.items():
            value = run()
            if i >= warmup:
                results[name].append(value)
    return results


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, and the quartiles as the spread."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "quartile_1": low, "quartile_3": high, "count": len(values)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Of what ran side by side in each round."""
    return summary([a / b for a, b in zip(ours, theirs, strict=True)])


def machine() -> dict[str, Any]:
    """Hardware, versions and commit."""
    record = {
        "processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"), "keepkv": keepkv.__version__, "commit": _commit(),
        "load": os.getloadavg()[0],
    }  # fmt: skip
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        record |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return record


def write(record: dict[str, Any], path: Path | None) -> None:
    """The record as the last line of standard output, and to a file."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    try:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
