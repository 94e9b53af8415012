"""A tiny random model in a folder, and vLLM's environment. Run by `make test-vllm`, in an environment of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_HOST_IP="127.0.0.1", VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING", VLLM_ENABLE_V1_MULTIPROCESSING="0", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1",
)  # fmt: skip

torch.set_num_threads(1)  # as the engines and Ray's workers: the default's choices can hang on the last bit

SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "dtype": "float32",
}  # fmt: skip


def build(folder: Path, family: str, config: str = "", **changes: object) -> str:
    """A random model whose attention is sharp enough that what is dropped is felt, with a byte-level tokenizer."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    config_class = getattr(transformers, config or f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**{**SIZES, **changes})).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(4)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(tmp_path_factory.mktemp("models") / "tiny", "Llama")


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose first two layers have sliding windows."""
    kinds = ["sliding_attention"] * 2 + ["full_attention"] * 2
    changes = {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 64, "query_pre_attn_scalar": 32}
    return build(tmp_path_factory.mktemp("models") / "hybrid", "Gemma3", "Gemma3TextConfig", **changes)
