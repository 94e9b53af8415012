"""Identity: which model and tokenizer a compact cache belongs to. The slots of one model mean nothing to another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv import schema
from keepkv.errors import InputError, ModelError
from keepkv.models.rotation import attention_modules

# Of a configuration, what nothing depends on in inference, and what has a field of its own in an identity
_WITHOUT_EFFECT = {
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "id2label", "initializer_range", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "pretraining_tp", "return_dict", "rope_parameters", "rope_scaling",
    "rope_theta", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_SAMPLE = 64  # of a weight's 8-byte words that are hashed as they are, beside the sum of all


def of_model(model: PreTrainedModel) -> dict[str, Any]:
    """What a model's keys and values depend on: architecture, configuration, weights, rotary parameters, precision.

    The digest of the weights is a SHA-256 over names, shapes, dtypes, the sum of all bytes, taken eight at a time as integers
    modulo 2^64, and a sample of them. So every byte of every weight counts, and it costs one pass over the weights.

    Returns:
        "type", "architecture", "rope" (a digest), "dtype", "weights" (a digest), and "config", every setting of the
        configuration that may have an effect: the model's identity, plain values.
    """
    config = model.config.get_text_config(decoder=True)
    rope: Any = getattr(config, "rope_parameters", None)
    return {
        "type": config.model_type,
        "architecture": type(model).__name__,
        "rope": digest(json.dumps(rope, sort_keys=True, default=str).encode()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": _weights(model),
        "config": _settings(config.to_dict()),
    }


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of how a tokenizer cuts text, and of its chat template: the tokenizer's identity."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        settings = json.loads(fast.to_str())
        for name in ("padding", "truncation"):  # of the last call, not of the tokenizer
            settings.pop(name, None)
        rules = json.dumps(settings, sort_keys=True)
    else:
        rules = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return digest(json.dumps([rules, tokenizer.chat_template], default=str).encode())


def check(file: str, stored: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Compares the identity that is stored in a file with a model's.

    Of the configurations, what only one of them has is passed over: another transformers has other fields. Files of format 5
    and older hold no configuration.

    Raises:
        InputError: if they differ; it names the first difference.
    """
    differences = {
        "type": "a model of another family",
        "architecture": "a model of another architecture",
        "rope": "a model with other rotary parameters",
        "weights": "a model with other weights",
    }
    for name, other in differences.items():
        if stored.get(name) != model[name]:
            values = f" ({stored.get(name)}, not {model[name]})" if name in ("type", "architecture") else ""
            raise InputError(f"{file!r} was compiled with {other}{values}: compile the document again, or load that model")
        if name == "rope" and stored.get("dtype") != model["dtype"]:  # before the weights, which differ then too
            raise InputError(
                f"{file!r} was compiled in {stored.get('dtype')}, and the model is loaded in {model['dtype']}: "
                f"--dtype {stored.get('dtype')}, or compile the document again"
            )
    then, now = schema.mapping(stored.get("config", {})), model.get("config", {})
    for name in sorted(then.keys() & now.keys()):
        if then[name] != now[name]:
            raise InputError(
                f"{file!r} was compiled with another configuration ({name} was {then[name]!r}, the model has {now[name]!r}): "
                "compile the document again, or load that model"
            )


def digest(data: bytes) -> str:
    """SHA-256, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that may have an effect, as JSON gives them back."""
    names = [name for name in sorted(config) if not name.startswith("_") and name not in _WITHOUT_EFFECT]
    settings: dict[str, Any] = json.loads(json.dumps({name: config[name] for name in names}, sort_keys=True, default=str))
    return settings


def fingerprint(model: PreTrainedModel) -> str:
    """What tells models apart without a pass over the weights: the configuration, and some numbers of the first and last layer.

    Copies of a model, and a model that is wrapped, have the same.
    """
    config = model.config.get_text_config(decoder=True)
    total = hashlib.sha256(json.dumps([config.model_type, _settings(config.to_dict())], sort_keys=True).encode())
    modules = [module for _, module in sorted(attention_modules(model).items())]
    sample = [
        parameter.detach().reshape(-1)[:: max(1, parameter.numel() // 8)][:8].float()
        for module in (*modules[:1], *modules[-1:])
        for parameter in list(module.parameters())[:2]
        if not parameter.is_meta
    ]
    total.update(torch.cat(sample).cpu().numpy().tobytes() if sample else b"")
    return total.hexdigest()


@torch.no_grad()
def _weights(model: PreTrainedModel) -> str:
    total = hashlib.sha256()
    sums: list[Tensor] = []
    for name, weight in sorted(model.state_dict(keep_vars=True).items()):
        if weight.is_meta:
            raise ModelError(f"the weights {name} are not in memory (offloaded), so that nobody can tell which model this is")
        total.update(f"{name} {list(weight.shape)} {weight.dtype} ".encode())
        raw = weight.detach().contiguous().view(-1).view(torch.uint8)
        words = len(raw) // 8
        sums.append(raw[: 8 * words].view(torch.int64).sum())
        sample = raw[: 8 * words].view(-1, 8)[:: max(1, words // _SAMPLE)]
        total.update(torch.cat([sample.reshape(-1), raw[8 * words :]]).cpu().numpy().tobytes())
    total.update(json.dumps(torch.stack([x.cpu() for x in sums]).tolist()).encode())
    return total.hexdigest()
