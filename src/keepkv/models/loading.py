"""Loads a model and its tokenizer by the name that a user typed, with errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from keepkv import paths
from keepkv.errors import ModelError, nearest
from keepkv.models import families, smollm2

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name: str = smollm2.NAME, device: str = "auto", dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model, in evaluation mode and with the attention that transformers prefers for it, and its tokenizer.

    Args:
        name: "smollm2" (the embedded model), a model that `make models` fetched, a folder, or a Hugging Face id.
        device: "auto" is CUDA if there is one, otherwise the CPU.
        dtype: One of `DTYPES`; "auto" is float32 on a CPU, and otherwise what the model was saved in.

    Raises:
        ModelError: for a name, device or dtype that does not exist, and for a model that cannot be compressed.
    """
    torch_device = _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: {nearest(dtype, DTYPES)}")
    torch_dtype = DTYPES.get(dtype, torch.float32 if torch_device.type == "cpu" else "auto")
    with _no_progress_bars():
        source = _source(name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(_why(name, error)) from error
    model = model.to(torch_device).eval()
    families.check_supported(model)
    return model, tokenizer


def tokenizer(name: str = smollm2.NAME) -> PreTrainedTokenizerBase:
    """A model's tokenizer alone; name: see `load`.

    Raises:
        ModelError: if there is none of that name.
    """
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(_source(name))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(_why(name, error)) from error
    return loaded


def _source(name: str) -> str:
    """What transformers loads: the folder of the embedded model or of one that `make models` fetched, or the name itself."""
    if name == smollm2.NAME:
        return str(smollm2.path())
    return str(paths.models_folder() / name) if name in _fetched() else name


def _fetched() -> list[str]:
    """The models that `make models` has fetched."""
    folder = paths.models_folder()
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".") if folder.is_dir() else []


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Turns transformers' own progress bars off for a while: keepkv shows its own."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _device(device: str) -> torch.device:
    """A device that exists. Raises ModelError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        named = torch.device(device)
        torch.empty(1, device=named)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            devices.append("mps")
        raise ModelError(f"the device {device!r} is not there: expected one of {', '.join(devices)}") from error
    return named


def _why(name: str, error: Exception) -> str:
    """Why a model could not be loaded, and what to do about it."""
    if Path(name).is_dir():
        return f"the folder {name!r} holds no model that transformers can load: {_first_line(error)}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"the model folder {name!r} does not exist: give a folder, a Hugging Face id, or {smollm2.NAME!r}"
    if "/" not in name:
        known = [smollm2.NAME, *_fetched()]
        return f"unknown model {name!r}: {nearest(name, known)} A folder or a Hugging Face id (owner/name) works too"
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return f"the model {name!r} cannot be loaded{offline}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
