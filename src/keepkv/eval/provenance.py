"""Where figures come from: versions, machine, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from keepkv import __version__


@lru_cache(1)
def versions() -> dict[str, str]:
    """Of what a result may depend on."""
    numbers = {"python": platform.python_version(), "machine": platform.machine(), "keepkv": __version__}
    for name in ("torch", "transformers", "numpy"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = "source"
    return numbers


@lru_cache(1)
def commit() -> str:
    """The commit of keepkv's own sources, if they are a checkout; with + if they were changed."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+", "--match="]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
