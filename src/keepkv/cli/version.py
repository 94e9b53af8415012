"""What `keepkv --version` prints: everything that a bug report should say about the installation."""

from __future__ import annotations

import platform
import warnings
from importlib.metadata import PackageNotFoundError, version


def version_text() -> str:
    """One line for each version, the platform, and the attention backend that this machine would take."""
    from keepkv import __version__

    facts = {"keepkv": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "transformers", "triton"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    facts["attention"] = _backend() if facts["torch"] != "not installed" else "none"
    return "\n".join(f"{name:12} {fact}" for name, fact in facts.items())


def _backend() -> str:
    """The attention backend that "auto" takes, and on which device."""
    import torch

    from keepkv.attend.dispatch import backend_for

    if torch.cuda.is_available():
        device, dtype = torch.device("cuda"), torch.bfloat16
        name = torch.cuda.get_device_name()
    else:
        device, dtype = torch.device("cpu"), torch.float32
        name = "CPU"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a refusal is a part of the answer
        backend = backend_for(device, dtype, 128)
    return f"{backend} on {name}, {str(dtype).removeprefix('torch.')}"
