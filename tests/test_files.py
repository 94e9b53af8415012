"""Compiled documents: what is loaded is what was saved, bit for bit, and nothing else is ever loaded."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_model, run, tokens
from keepkv import KeepCache
from keepkv.documents import format, identity
from keepkv.documents.document import Document, Recipe, answer, compile_text, load, save
from keepkv.documents.packing import pack, unpack
from keepkv.errors import InputError
from keepkv.models import loading

TEXT = "The quick brown fox jumps over the lazy dog, and the dog looks at the fox without getting up. " * 4


def written(cache: KeepCache, file: Path) -> None:
    header, tensors = pack(cache)
    format.write(file, header, tensors)


@pytest.mark.parametrize(
    ("method", "slot_dtype"),
    [*((name, "float") for name in ("keepkv", "snapkv", "minicache", "full", "streaming-shifted")),
     ("keepkv", "int4"), ("snapkv", "int8")],
)  # fmt: skip
def test_what_is_loaded_answers_bit_for_bit_the_same(family: str, method: str, slot_dtype: str, tmp_path: Path) -> None:
    model = make_model(family, torch.float32)
    if method == "minicache" and family == "gemma3":
        pytest.skip("two layers with full attention are too few to share")
    cache = KeepCache(model, 0.4, method, slot_dtype=slot_dtype)
    model(tokens(1, 60), past_key_values=cache)
    model(tokens(1, 5, seed=1), past_key_values=cache)  # an exact tail
    written(cache, tmp_path / "a.keep")
    again = unpack(format.Contents(tmp_path / "a.keep"), model, model.device)
    later = tokens(1, 4, seed=2)
    assert again.get_seq_length() == cache.get_seq_length()
    ours, theirs = (model(later, past_key_values=each.fork()).logits for each in (cache, again))
    assert torch.equal(ours, theirs)
    assert again.report().heads == cache.report().heads
    assert again.report().slot_dtype == slot_dtype
    held = again.report().kv_bytes
    assert 0.7 * cache.report().kv_bytes < held <= cache.report().kv_bytes  # a sliding window's view holds some more


@pytest.fixture(scope="module")
def model_and_tokenizer(folder: str):
    return loading.load(folder)


@pytest.fixture(scope="module")
def compiled(model_and_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Document, Path]:
    file = tmp_path_factory.mktemp("compiled") / "fox.keep"
    recipe = Recipe("20%", "snapkv", exact=True)
    document = compile_text(*model_and_tokenizer, TEXT, recipe, "fox.txt", "tiny")
    save(document, file, *model_and_tokenizer)
    return document, file


def test_a_document_comes_back_whole(compiled, model_and_tokenizer) -> None:
    document, file = compiled
    again = load(file, *model_and_tokenizer)
    assert torch.equal(again.ids, document.ids)
    assert (again.lead, again.before, again.after, again.recipe, again.source) == (
        document.lead, document.before, document.after, document.recipe, document.source,
    )  # fmt: skip
    assert again.lead == len("<|user|>")
    for index in range(3):
        assert all(map(torch.equal, again.exact(index), document.exact(index)))
    told = [answer(*model_and_tokenizer, each, ["Who?"], 6).answers[0].tokens for each in (document, again)]
    assert told[0] == told[1]


def test_a_file_without_ids_answers_the_same_and_does_not_hold_the_text(compiled, model_and_tokenizer, tmp_path: Path) -> None:
    document, _ = compiled
    file = tmp_path / "private.keep"
    save(document, file, *model_and_tokenizer, with_ids=False)
    again = load(file, *model_and_tokenizer)
    assert again.ids is None
    told = [answer(*model_and_tokenizer, each, ["Who?"], 6).answers[0].tokens for each in (document, again)]
    assert told[0] == told[1]


def test_another_model_precision_or_tokenizer_is_refused(compiled, model_and_tokenizer) -> None:
    _, file = compiled
    model, tokenizer = model_and_tokenizer
    for changes in ({"seed": 1}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, {"num_hidden_layers": 2}):
        other = make_model("llama", torch.float32, vocab_size=256, max_position_embeddings=4096, **changes)
        with pytest.raises(InputError, match="compiled with a model with other"):
            load(file, other, tokenizer)
    with pytest.raises(InputError, match="another family"):
        load(file, make_model("qwen3", torch.float32, vocab_size=256), tokenizer)
    half = make_model("llama", torch.bfloat16, vocab_size=256, max_position_embeddings=4096)
    with pytest.raises(InputError, match="--dtype float32"):
        load(file, half, tokenizer)
    with pytest.raises(InputError, match="another tokenizer"):
        load(file, model, "another")


def test_one_changed_weight_is_another_model(model_and_tokenizer) -> None:
    model = make_model("llama", torch.float32)
    before = identity.of_model(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    kept = weight[13, 17].item()
    weight[13, 17] = kept + 1e-3
    assert identity.of_model(model)["weights"] != before["weights"]
    weight[13, 17] = kept
    assert identity.of_model(model) == before


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
    forged(**{f"{name}.keys": tensors[f"{name}.keys"].half()})
    forged(**{"layer.1.keys": torch.zeros(1, 10**6, 0, 16)})
    forged(ids=tensors["ids"] + 256)
    forged(header={"seen": 10**12})
    forged(header={"layers": [{}] * 3})
    forged(header={"recipe": {"budget": 1}})
    forged(header={"report": None})
    for data in (b"", b"PK\x03\x04", (2**60).to_bytes(8, "little") + b"{}", (30).to_bytes(8, "little") + b"[" * 30):
        bad.write_bytes(data)
        with pytest.raises(InputError, match="is not a whole"):
            format.Contents(bad)
    save_file({"x": torch.zeros(1)}, bad, {"keepkv": json.dumps({"format": 99})})
    with pytest.raises(InputError, match="newer keepkv"):
        format.Contents(bad)
    with pytest.raises(InputError, match="cannot be read"):
        format.Contents(tmp_path / "none.keep")


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model = make_model(dtype=torch.float32)
    cache = KeepCache(model, 0.5)
    with pytest.raises(InputError, match="nothing"):
        pack(cache)
    model(tokens(2, 40), past_key_values=cache)
    with pytest.raises(InputError, match="one text"):
        pack(cache)
    single = KeepCache(model, 0.5)
    model(tokens(1, 40), past_key_values=single)
    with pytest.raises(InputError, match="cannot be written"):
        written(single, tmp_path / "none" / "a.keep")
    assert not list(tmp_path.iterdir())


def test_compile_and_ask(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(TEXT + name)
    texts = [str(tmp_path / f"{name}.txt") for name in ("a", "b")]
    args = ["--model", folder, "--budget", "20%", "--method", "snapkv", "--exact"]
    status, out, err = run(monkeypatch, capsys, "compile", *texts, "-o", str(tmp_path / "made"), *args, "--json")
    assert (status, err) == (0, "")
    files = [json.loads(line)["file"] for line in out.splitlines()]
    assert [Path(file).name for file in files] == ["a.keep", "b.keep"]
    ask = ["ask", *files[:1], "Who?", "What?", "--max-new-tokens", "4", "--json"]
    status, out, err = run(monkeypatch, capsys, *ask)
    assert (status, err) == (0, "")
    alone = json.loads(out)
    assert alone["model"] == folder  # the file says which
    assert len(alone["answers"]) == 2
    direct = ["ask", texts[0], "Who?", "What?", "--max-new-tokens", "4", "--json", "--model", folder, "--budget", "20%"]
    direct += ["--method", "snapkv"]
    _, out, _ = run(monkeypatch, capsys, *direct)
    assert json.loads(out)["answers"] == alone["answers"]
    for repair in ([], ["--repair", "25%"]):
        status, out, err = run(monkeypatch, capsys, "ask", *files, "Who?", "--max-new-tokens", "4", "--json", *repair)
        assert (status, err) == (0, "")
        assert json.loads(out)["tokens"] == 2 * alone["tokens"] - len("<|user|>")


def test_mistakes_get_one_line(monkeypatch, capsys, folder: str, tmp_path: Path, compiled) -> None:
    file, text = str(compiled[1]), tmp_path / "a.txt"
    text.write_text(TEXT)
    for args, expected in (
        (["ask", file, "Who?", "--budget", "5%"], "--budget is for texts"),
        (["ask", file, file], "no question"),
        (["ask", str(text), "Who?", "--repair", "10%", "--model", folder], "--repair is for joined"),
        (["ask", file, file, "Who?", "--repair", "150%"], "'150%' is not a share"),
        (["ask", file, file, "Who?", "--repair", "most"], "'most' is not a share"),
        (["ask", file, file, "Who?", "--repair", "64MB"], "'64MB' is not a share"),
        (["compile", file, "--model", folder], "is compiled already"),
        (["compile", str(text), str(text), "--model", folder], "two documents"),
        (["compile", str(text), "-o", str(tmp_path / "no" / "a.keep"), "--model", folder], "folder that exists"),
        (["compile", str(text), "--exact", "--chunk", "64", "--model", folder], "read at once"),
        (["ask", str(tmp_path / "none.keep"), "Who?"], "cannot be read"),
    ):
        status, out, err = run(monkeypatch, capsys, *args)
        assert (status, out) == (2, "")
        assert expected in err
        assert len(err.strip().splitlines()) == 1


def test_what_is_made_already_is_not_made_again(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    docs = []
    for number in range(3):
        docs.append(tmp_path / f"{number}.txt")
        docs[-1].write_text(TEXT + str(number))
    args = ["compile", *map(str, docs), "--model", folder, "--budget", "25%", "--resume", "--json"]

    def made(*more: str) -> list[bool]:
        status, out, _ = run(monkeypatch, capsys, *args, *more)
        assert status == 0
        return [json.loads(line)["made"] for line in out.splitlines()]

    assert made() == [True] * 3
    before = (tmp_path / "0.keep").read_bytes()
    assert made() == [False] * 3
    assert (tmp_path / "0.keep").read_bytes() == before
    docs[1].write_text(TEXT + "another")
    (tmp_path / "2.keep").write_bytes(before[:-20])
    assert made() == [False, True, True]
    assert made("--budget", "30%") == [True] * 3
    assert made("--no-ids", "--budget", "30%") == [True] * 3


def test_ray_is_asked_for_by_name(monkeypatch, capsys, folder: str, tmp_path: Path) -> None:
    text = str(tmp_path / "text.txt")
    Path(text).write_text(TEXT)
    monkeypatch.setitem(sys.modules, "ray", None)
    status, _, err = run(monkeypatch, capsys, "compile", text, "--model", folder, "--ray")
    assert status == 2
    assert "keepkv[ray]" in err
    status, _, err = run(monkeypatch, capsys, "compile", "-", "--model", folder, "--ray")
    assert status == 2
    assert "standard input" in err
