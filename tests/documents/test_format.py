"""The .keep format: what is damaged or forged is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import FOX
from keepkv import Recipe
from keepkv.documents import format
from keepkv.documents.document import compile_text, load, save
from keepkv.documents.packing import pack
from keepkv.errors import InputError
from keepkv.models import identity, loading


def same(file: Path, model, tokenizer, expected: dict[str, torch.Tensor]) -> bool:
    """Whether a file is loaded at all; if so, it must be what was saved."""
    try:
        document = load(file, model, tokenizer, KNOWN)
        _, tensors = pack(document.cache)
        for index in range(3):
            tensors[f"exact.{index}.keys"], tensors[f"exact.{index}.values"] = document.exact(index)
    except InputError:
        return False
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    return True


KNOWN: dict[str, str] = {}


def test_mutated_files_are_refused_or_equal(compiled, model_and_tokenizer, tmp_path: Path) -> None:
    document, file = compiled
    model, tokenizer = model_and_tokenizer
    KNOWN.update(identity.of_model(model))
    cut = identity.of_tokenizer(tokenizer)
    _, expected = pack(document.cache)
    for index in range(3):
        expected[f"exact.{index}.keys"], expected[f"exact.{index}.values"] = document.exact(index)
    raw, rng, bad = file.read_bytes(), random.Random(0), tmp_path / "bad.keep"
    header = int.from_bytes(raw[:8], "little")
    refused = 0
    for number in range(250):
        data = bytearray(raw)
        kind = number % 5
        if kind < 3:  # one byte: in the length, the header, anywhere
            place = rng.randrange((8, 8 + header, len(data))[kind])
            data[place] ^= rng.randrange(1, 256)
        elif kind == 3:
            del data[rng.randrange(len(data)) :]
        else:
            lo = rng.randrange(len(data))
            data[lo : lo + rng.randrange(64)] = rng.randbytes(rng.randrange(64))
        bad.write_bytes(data)
        refused += not same(bad, model, cut, expected)
    assert refused > 240  # the others changed nothing that matters
    bad.write_bytes(raw)
    assert same(bad, model, cut, expected)


def test_forged_files_are_refused(compiled, model_and_tokenizer, tmp_path: Path) -> None:
    """Files whose digests are right and whose content is not: nothing is trusted because it is signed with itself."""
    _, file = compiled
    bad = tmp_path / "bad.keep"
    whole = format.Contents(file)
    tensors = load_file(file)

    def forged(**changes: object) -> None:
        header = {k: v for k, v in whole.header.items() if k not in ("tensors", "format")}
        format.write(bad, {**header, **changes.pop("header", {})}, {**tensors, **changes})
        with pytest.raises(InputError, match="is not a whole"):
            load(bad, *model_and_tokenizer)

    name = "layer.0.slots"
    offsets = tensors[f"{name}.offsets"]
    forged(**{f"{name}.offsets": offsets.flip(0)})
    forged(**{f"{name}.offsets": offsets * 2})
    forged(**{f"{name}.positions": tensors[f"{name}.positions"] + 10**6})
    forged(**{f"{name}.bias": tensors[f"{name}.bias"][:-1]})
    stored = [part for part in tensors if part.startswith((f"{name}.keys.", f"{name}.values."))]
    assert len(stored) == 6, "codes, steps, lows and starts of keys, codes and steps of values"
    for part in stored:
        forged(**{part: tensors[part][:-1]})
        forged(**{part: tensors[part].half() if part.endswith("lows") else tensors[part].double()})
    forged(**{"layer.1.keys": torch.zeros(1, 10**6, 0, 16)})
    forged(ids=tensors["ids"] + 256)
    forged(header={"seen": 10**12})
    forged(header={"layers": [{}] * 3})
    forged(header={"recipe": {"budget": 1}})
    forged(header={"report": None})
    plain = tmp_path / "plain.keep"
    save(compile_text(*model_and_tokenizer, FOX, Recipe("20", "snapkv", "float")), plain, *model_and_tokenizer)
    whole, tensors = format.Contents(plain), load_file(plain)
    forged(**{f"{name}.keys": tensors[f"{name}.keys"].half()})
    for data in (b"", b"PK\x03\x04", (2**60).to_bytes(8, "little") + b"{}", (30).to_bytes(8, "little") + b"[" * 30):
        bad.write_bytes(data)
        with pytest.raises(InputError, match="is not a whole"):
            format.Contents(bad)
    save_file({"x": torch.zeros(1)}, bad, {"keepkv": json.dumps({"format": 99})})
    with pytest.raises(InputError, match="newer keepkv"):
        format.Contents(bad)
    with pytest.raises(InputError, match="cannot be read"):
        format.Contents(tmp_path / "none.keep")


def test_a_file_belongs_to_a_configuration_too(compiled, folder: str) -> None:
    _, file = compiled
    model, tokenizer = loading.load(folder)
    known = identity.of_model(model)
    assert json.loads(json.dumps(known)) == known
    for name, value in (("rms_norm_eps", 1e-3), ("hidden_act", "gelu"), ("max_position_embeddings", 99), ("new_softcap", 30.0)):
        other = {**known, "config": {**known["config"], name: value}}
        if name in known["config"]:
            with pytest.raises(InputError, match=f"another configuration \\({name} was"):
                load(file, model, tokenizer, other)
        else:  # a field of another transformers
            load(file, model, tokenizer, other)


def test_a_loaded_file_may_be_written_over_and_cut_short(compiled, model_and_tokenizer, tmp_path: Path) -> None:
    _, file = compiled
    model, tokenizer = model_and_tokenizer
    used = tmp_path / "used.keep"
    used.write_bytes(file.read_bytes())
    document = load(used, model, tokenizer)
    question = document.question(tokenizer, "Who?")
    before = model(question, past_key_values=document.cache.fork()).logits
    used.write_bytes(b"\x55" * used.stat().st_size)
    assert torch.equal(model(question, past_key_values=document.cache.fork()).logits, before)
    with pytest.raises(InputError, match="was altered"):
        document.exact(0)
    used.write_bytes(b"")
    assert torch.equal(model(question, past_key_values=document.cache.fork()).logits, before)
    with pytest.raises(InputError, match="cut short"):
        document.exact(0)


def test_what_is_no_number_is_neither_written_nor_read(compiled, model_and_tokenizer, tmp_path: Path, monkeypatch) -> None:
    document, _ = compiled
    header, tensors = pack(document.cache)
    for value in (float("nan"), float("inf")):
        tensors["layer.0.keys"] = torch.full((1, 2, 1, 16), value)
        with pytest.raises(InputError, match=r"layer\.0\.keys holds what is no number"):
            format.write(tmp_path / "bad.keep", header, tensors)
        with monkeypatch.context() as patch:
            patch.setattr(format, "_is_sound", lambda name, tensor: True)
            format.write(tmp_path / "bad.keep", header, tensors)
        with pytest.raises(InputError, match="no number"):
            format.Contents(tmp_path / "bad.keep").take("layer.0.keys", 1, 2, 1, 16)
