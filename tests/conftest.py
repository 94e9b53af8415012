"""What every test finds: the environment, a tiny model in a folder, and the embedded model."""

from __future__ import annotations

import os
from pathlib import Path

# Before transformers and Triton are imported, which read them then: keep these lines above the imports below.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import FAMILIES, FOX, TEMPLATE, make_model
from keepkv.documents.document import Document, Recipe, compile_text, save
from keepkv.models import loading


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder with a byte tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!", pad_token="!", chat_template=TEMPLATE)
    wrapped.save_pretrained(path)
    make_model("llama", vocab_size=256, max_position_embeddings=4096).float().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model_and_tokenizer(folder: str):
    return loading.load(folder)


@pytest.fixture(scope="module")
def compiled(model_and_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Document, Path]:
    """A compiled document, and its file."""
    file = tmp_path_factory.mktemp("compiled") / "fox.keep"
    recipe = Recipe("20%", "snapkv", exact=True)
    document = compile_text(*model_and_tokenizer, FOX * 4, recipe, "fox.txt", "tiny")
    save(document, file, *model_and_tokenizer)
    return document, file


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory):
    """Converted afresh, so that the conversion that is tested is the code's and not an older one's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEEPKV_CACHE", str(tmp_path_factory.mktemp("cache")))
        return loading.load()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield
