"""Identity: which model and tokenizer a compact cache belongs to. Slots of one model mean nothing to another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv.errors import InputError

_SAMPLE = 64  # eights of a weight's bytes that are hashed as they are, beside the sum of all


def of_model(model: PreTrainedModel) -> dict[str, Any]:
    """What a model's keys and values depend on: architecture, weights, rotary parameters, precision.

    weights: a digest in which every byte of every weight counts: SHA-256 over names, shapes, dtypes, the sum of all bytes,
    taken eight at a time as integers modulo 2^64, and a sample of them. It costs one pass over the weights.
    """
    config = model.config.get_text_config(decoder=True)
    rope: Any = getattr(config, "rope_parameters", None)
    return {
        "type": config.model_type,
        "architecture": type(model).__name__,
        "rope": digest(json.dumps(rope, sort_keys=True, default=str).encode()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": _weights(model),
    }


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of how a tokenizer cuts text, and of its chat template."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        told = json.loads(fast.to_str())
        told.pop("padding", None), told.pop("truncation", None)  # of the last call, not of the tokenizer
        rules = json.dumps(told, sort_keys=True)
    else:
        rules = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return digest(json.dumps([rules, tokenizer.chat_template], default=str).encode())


def check(file: str, found: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raises InputError, which names the first difference, if a file was made with another model."""
    told = {
        "type": "a model of another family",
        "architecture": "a model of another architecture",
        "rope": "a model with other rotary parameters",
        "weights": "a model with other weights",
    }
    for name, what in told.items():
        if found.get(name) != model[name]:
            values = f" ({found.get(name)}, not {model[name]})" if name in ("type", "architecture") else ""
            raise InputError(f"{file!r} was compiled with {what}{values}: compile the document again, or load that model")
        if name == "rope" and found.get("dtype") != model["dtype"]:  # before the weights, which differ then too
            raise InputError(
                f"{file!r} was compiled in {found.get('dtype')}, and the model is loaded in {model['dtype']}: "
                f"--dtype {found.get('dtype')}, or compile the document again"
            )


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@torch.no_grad()
def _weights(model: PreTrainedModel) -> str:
    total = hashlib.sha256()
    sums: list[Tensor] = []
    for name, weight in sorted(model.state_dict(keep_vars=True).items()):
        total.update(f"{name} {list(weight.shape)} {weight.dtype} ".encode())
        raw = weight.detach().contiguous().view(-1).view(torch.uint8)
        whole = len(raw) // 8 * 8
        sums.append(raw[:whole].view(torch.int64).sum())
        some = raw[:whole].view(-1, 8)[:: max(1, whole // 8 // _SAMPLE)]
        total.update(torch.cat([some.reshape(-1), raw[whole:]]).cpu().numpy().tobytes())
    total.update(json.dumps(torch.stack([x.cpu() for x in sums]).tolist()).encode())
    return total.hexdigest()
