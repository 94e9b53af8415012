"""Where figures come from: versions, machine, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@lru_cache(1)
def versions() -> dict[str, str]:
    """Of what a result may depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("keepkv", "torch", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source"
    return found


@lru_cache(1)
def commit() -> str:
    """The commit of keepkv's own sources, if they are a checkout; with + if they were changed."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+", "--match="]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"}, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
