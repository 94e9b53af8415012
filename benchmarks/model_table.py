"""Which of transformers' models work with keepkv: a survey of every type in its causal-LM mapping, and docs/models.md.

    python benchmarks/model_table.py                # all types, and writes docs/models.md: some minutes
    python benchmarks/model_table.py glm gpt_oss    # only these, on the screen

Every type is built with random weights and a configuration that is shrunken here: a few layers of every kind, 64 dimensions.
Nothing is downloaded. Each is then checked as `keepkv check` checks a model (keepkv.inspection.checkup).
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

from keepkv.errors import KeepKVError
from keepkv.inspection import checkup

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
MOST = 30_000_000  # parameters of a model that is built
SECONDS = 60  # of processor time, for one type

# Whatever a configuration has of these becomes that small.
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "n_inner", "ffn_dim", "d_ff", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 4),
    **dict.fromkeys(("num_hidden_layers", "decoder_layers", "encoder_layers", "num_encoder_layers"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "mamba_n_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "laurel_rank", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "global_head_dim"), 32),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "mamba_expand"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 24),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 32),
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "hidden_size_per_layer_input": 16,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
EVEN_IF_NONE = {"head_dim", "num_key_value_heads", "n_routed_experts", "bos_token_id", "eos_token_id", "pad_token_id"}

KINDS = ("full_attention", "sliding_attention")

# What shrinking alone gets wrong.
OTHER: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}, "max_seq_len": 2048,
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma3n_text": {
        "num_hidden_layers": 10, "num_kv_shared_layers": 5, "intermediate_size": [64] * 10,
        "activation_sparsity_pattern": [0.0] * 10,
    },
    "gemma4_text": {"num_hidden_layers": 12, "num_kv_shared_layers": 6},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "nemotron_h": {"n_groups": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "cohere_compass_text": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in KINDS}},
    "dots1": {"n_shared_experts": 1, "num_experts_per_tok": 2},
    "longcat_flash": {"ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "num_layers": 2, "moe_topk": 2},
    "xlm": {"emb_dim": 64, "n_words": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 32}, "mistral": {"sliding_window": None},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": [32, 64], "axial_pos_embds_dim": [32, 32]},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


class Result(NamedTuple):
    """What became of a type: "works", "in part", "refused", "wrong" or "not built", and why."""

    status: str
    why: str


def small_config(kind: str | type) -> Any:
    """A small configuration of a type of transformers."""
    config_class = CONFIG_MAPPING[kind] if isinstance(kind, str) else kind
    config = config_class()
    given = config.to_dict()
    small = {
        name: value
        for name, value in SMALL.items()
        if name in given
        and (given[name] is not None or name in EVEN_IF_NONE)
        and not isinstance(getattr(config_class, name, None), property)
    }
    if given.get("num_key_value_heads") == given.get("num_attention_heads") and "num_key_value_heads" in small:
        small["num_key_value_heads"] = 4
    if "qk_rope_head_dim" in small and "head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]
    if types := given.get("layer_types"):
        small["num_hidden_layers"] = max(4, 1 + max(types.index(kind) for kind in set(types)))
    for name in getattr(config, "sub_configs", {}):
        if (part := getattr(config, name, None)) is not None:
            small[name] = small_config(type(part)).to_dict()
    return config_class(**{**small, **OTHER.get(config.model_type, {})})


def build(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """A tiny random model of a type, with sharper attention than fresh weights give. changes: of its configuration."""
    config = small_config(kind)
    for name, value in changes.items():
        setattr(config.get_text_config(decoder=True), name, value)
    model_class = getattr(transformers, TYPES[kind])
    if not isinstance(config, model_class.config_class):  # the type of a model with more than text
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class._from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"{size / 1e6:.0f} million parameters even when shrunken")
    torch.manual_seed(0)
    model: PreTrainedModel = model_class._from_config(config, experts_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "router" not in name and "gate" not in name:
                parameter.mul_(4)
    return model


def survey(kind: str) -> Result:
    """Builds a type and checks it, in float64 and in bfloat16."""
    try:
        model = build(kind)
    except Exception as error:
        return Result("not built", " ".join(str(error).split())[:120] or type(error).__name__)
    found = checkup.check(model)
    if found.refusal:
        return Result("refused", found.refusal)
    if failed := [trial for trial in found.trials if not trial.passed]:
        return Result("wrong", "; ".join(f"{trial.name}: {trial.detail}" for trial in failed))
    rough = checkup.check(model.bfloat16())
    if not rough.passed:
        return Result("wrong", f"in bfloat16: {rough.refusal or [trial for trial in rough.trials if not trial.passed]}")
    parts = {name.removesuffix("_config") for name in getattr(model.config, "sub_configs", {})}
    senses = sorted(parts & {"vision", "audio"})
    if senses:
        return Result("in part", f"text alone was tried, not {' or '.join(senses)}. {_layers(found)}")
    return Result("works", _layers(found))


def _layers(found: checkup.Checkup) -> str:
    """Which layers are compressed."""
    kinds = {
        "have a sliding window or chunks, and stay as they are": found.windows,
        "have a state that every token changes, which stays as it is": found.states,
        "use another layer's keys, or keep nothing": found.sharing,
    }
    notes = [f"{count} of {found.layers} layers {what}" for what, count in kinds.items() if count]
    notes += [f"{found.unrotated} of {found.compressed} compressed layers do not rotate"] if found.unrotated else []
    return "; ".join(notes)


def _late(signal_number: int, frame: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} seconds")


def _surveyed(kind: str) -> Result:
    """As `survey`, in bounded time, and never fails."""
    signal.signal(signal.SIGPROF, _late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return survey(kind)
    except KeepKVError as error:
        return Result("refused", str(error))
    except Exception as error:
        return Result("wrong", f"{type(error).__name__}: {error}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def page(results: dict[str, Result]) -> str:
    """docs/models.md."""
    count = Counter(result.status for result in results.values())
    meaning = {
        "works": "exact where every token is kept (float64 and bfloat16); a compressed cache is the one that is attended to; "
        "forks and files go on bit for bit; queries move as the model itself would move them",
        "in part": "the same, but for what the table says",
        "refused": "an error names what is missing, before anything is read",
        "wrong": "something of the above failed",
        "not built": "no small model of this type could be made here, so nothing is known",
    }
    lines = [
        "# Which models work",
        "",
        "keepkv knows no model by name. It looks at the properties of a model, and tries the first cache for each class and "
        "configuration on a few tokens ([Errors](errors.md#modelerror-models) lists what it may find missing). "
        "`keepkv check MODEL` does the same for one model, and says what a budget saves.",
        "",
        f"This table has all {len(results)} types of the causal-LM mapping of transformers {transformers.__version__}, "
        "each as a small random model. It shows that the arithmetic is right, and not how good answers are: see "
        "[Limits](limits.md). It is written by `python benchmarks/model_table.py`; do not edit it.",
        "",
        "| | types | what it means |",
        "|---|---|---|",
        *(f"| {status} | {count[status]} | {text} |" for status, text in meaning.items()),
    ]
    for status in meaning:
        own = {kind: result.why for kind, result in results.items() if result.status == status}
        if not own:
            continue
        lines += ["", f"## {status.capitalize()}", "", "| type | |", "|---|---|"]
        lines += [f"| `{kind}` | {why.replace('|', '/').strip() or 'every layer is compressed'} |" for kind, why in own.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Surveys the types that are named, or all of them."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    results = {}
    for kind in sys.argv[1:] or sorted(TYPES):
        results[kind] = _surveyed(kind)
        print(f"{kind:28} {results[kind].status:10} {results[kind].why}", flush=True)
    print(dict(Counter(result.status for result in results.values())))
    if not sys.argv[1:]:
        PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
