"""Where keepkv keeps what it makes, and what its files are called."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$KEEPKV_CACHE, or keepkv under $XDG_CACHE_HOME, or ~/.cache/keepkv."""
    own, shared = os.environ.get("KEEPKV_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "keepkv"


def models_folder() -> Path:
    """Where `make models` puts the models that keepkv is measured on, a folder each; `--model NAME` looks there."""
    return cache_folder() / "models"


SUFFIX = ".keep"
