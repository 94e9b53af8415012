"""The checkup: what it promises is tried, and what it finds wrong is said."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import make_model, run, small_model, tokens
from keepkv import KeepCache
from keepkv.inspection import checkup


def test_every_family_passes(family: str) -> None:
    found = checkup.check(make_model(family))
    assert found.passed, found
    assert [trial.passed for trial in found.trials] == [True] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_pass(dtype: torch.dtype) -> None:
    for kind in ("glm4", "mixtral", "llama4_text"):
        assert checkup.check(small_model(kind, dtype)).passed, kind


def test_bytes_are_those_of_the_caches() -> None:
    model = make_model("gemma3", torch.float32)
    found = checkup.check(model)
    assert (found.layers, found.compressed, found.window) == (3, 2, 23)
    ids = tokens(1, 80)
    cache = KeepCache(model, "25%", slot_dtype="float")
    model(ids, past_key_values=cache)
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    slots = sum(layer.slots.keys[:].numel() * 4 * 2 for layer in cache.keep_layers)
    assert found.full_bytes(80) == 80 * found.token_bytes + 23 * 2 * 2 * 16 * 4
    assert found.kept_bytes(80, 0.25) == pytest.approx(held + slots, rel=0.07)  # beside votes and positions


def test_a_refusal_says_what_is_missing() -> None:
    found = checkup.check(small_model("diffllama"))
    assert not found.passed
    assert "attended to 2 times" in found.refusal
    assert json.dumps(found.to_dict())


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that compresses although it should keep everything, and one that is not attended to."""
    model = make_model()

    class Wrong(KeepCache):
        def __init__(self, model, budget="25%", **options: object) -> None:
            super().__init__(model, "25%", **options)

        def compress(self, *args: object, **options: object):
            return super().compress(*args, **options)

    monkeypatch.setattr(checkup, "KeepCache", Wrong)
    found = checkup.check(model)
    assert not found.passed
    assert not found.trials[0].passed


def test_the_command_prints_and_is_a_gate(monkeypatch, capsys, folder: str, tmp_path) -> None:
    status, out, err = run(monkeypatch, capsys, "check", folder)
    assert (status, err) == (0, "")
    assert "3 are compressed" in out
    assert out.count("yes") == 5
    status, out, _ = run(monkeypatch, capsys, "check", folder, "--json")
    assert status == 0
    assert json.loads(out)["passed"] is True

    small_model("gpt2", torch.float32).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((type(tmp_path)(folder) / file).read_bytes())
    status, _, err = run(monkeypatch, capsys, "check", str(tmp_path))
    assert status == 2
    assert "gpt2 does not rotate its keys" in err

    monkeypatch.setattr(checkup, "_forked", lambda *_: (False, "no"))
    status, out, _ = run(monkeypatch, capsys, "check", folder)
    assert status == 1
