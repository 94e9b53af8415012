"""The self-check: models are admitted by what they do, and refused by what they lack, whatever they are called."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.models.llama import modeling_llama

from helpers import SIZES, make_model, small_model, tokens
from keepkv import KeepCache, ModelError
from keepkv.cache import self_check
from keepkv.documents.joining.join import join

CALL = "query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)"
INTERLEAVED = "torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)"


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "_verdicts", {})


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PreTrainedModel]:
    """A tiny model of transformers' Llama file, copied under another name, with lines changed."""

    def make(**changes: str) -> PreTrainedModel:
        source = inspect.getsource(modeling_llama).replace("from ...", "from transformers.")
        source = source.replace("from .configuration_llama", "from transformers.models.llama.configuration_llama")
        for before, after in (pair.split(" => ") for pair in changes.values()):
            assert before in source
            source = source.replace(before, after)
        file = tmp_path / "modeling_other.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location("modeling_other", file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "modeling_other", module)
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        config = module.LlamaConfig(**SIZES)
        config.model_type = "other"
        return module.LlamaForCausalLM(config).double().eval()

    return make


def check_works(model: PreTrainedModel) -> None:
    """The logits are transformers' own with every token kept, and finite when compressed; joined texts have the right keys."""
    ids = tokens(1, 90)
    full, ours = DynamicCache(config=model.config), KeepCache(model, 1.0)
    for part in (ids[:, :80], ids[:, 80:]):
        expected, got = (model(part, past_key_values=cache).logits for cache in (full, ours))
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)
    small = KeepCache(model, "25%")
    model(ids[:, :80], past_key_values=small)
    assert small.keep_layers[0].tail == 0
    assert model(ids[:, 80:], past_key_values=small).logits.isfinite().all()
    check_joined(model)


def check_joined(model: PreTrainedModel) -> None:
    """A text that stands behind another one has the keys, in the first layer, that it has when it is read there."""
    ids = tokens(1, 60)
    first, second, both = (KeepCache(model, auto=False) for _ in range(3))
    model(ids[:, :35], past_key_values=first)
    model(ids[:, 35:], past_key_values=second)
    model(ids, past_key_values=both)
    joint = join(model, [first, second], [0, 0])
    expected, got = (cache.layers[0].keys for cache in (both, joint))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_copy_with_another_name_is_admitted(copied: Callable[..., PreTrainedModel]) -> None:
    check_works(copied())


def test_a_copy_that_rotates_other_pairs_is_admitted_because_it_says_so(copied: Callable[..., PreTrainedModel]) -> None:
    pairs = copied(
        half=f"return torch.cat((-x2, x1), dim=-1) => return {INTERLEAVED}",
        cos="cos = cos.unsqueeze => cos = cos[..., : cos.shape[-1] // 2].repeat_interleave(2, -1).unsqueeze",
        sin="sin = sin.unsqueeze => sin = sin[..., : sin.shape[-1] // 2].repeat_interleave(2, -1).unsqueeze",
    )
    check_works(pairs)
    assert KeepCache(pairs).rotations[0].first == slice(0, 15, 2)


@pytest.mark.parametrize(
    "after",
    [
        CALL.replace("sin)", "-sin)"),
        f"{CALL}; {CALL}",
        f"{CALL}; key_states = key_states * (2 + cos[:, None, :, :1])",
        f"{CALL}; query_states = query_states * (2 + cos[:, None, :, -1:] - cos[:, None, :, :1])",
    ],
    ids=["backwards", "twice", "scaled keys", "scaled queries"],
)
def test_a_copy_that_rotates_in_another_way_than_it_says_is_refused(copied: Callable[..., PreTrainedModel], after: str) -> None:
    with pytest.raises(ModelError, match="in another way than by the rotation that its code names"):
        KeepCache(copied(call=f"{CALL} => {after}"))


def test_a_copy_whose_pairs_and_angles_do_not_belong_together_is_refused(copied: Callable[..., PreTrainedModel]) -> None:
    """Neighbors rotated by the angles of halves: no rotation at all."""
    with pytest.raises(ModelError, match="more than to rotate pairs"):
        KeepCache(copied(half=f"return torch.cat((-x2, x1), dim=-1) => return {INTERLEAVED}"))


@pytest.mark.parametrize(
    "line",
    [
        "value_states = 2 * value_states",
        "value_states = value_states[:, :, :-1]; key_states = key_states[:, :, :-1]; attention_mask = None",
        "value_states = torch.roll(value_states, 1, 1)",
    ],
)
def test_attention_over_something_else_than_what_was_given_is_refused(
    copied: Callable[..., PreTrainedModel], line: str
) -> None:
    update = "key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)"
    with pytest.raises(ModelError):
        KeepCache(copied(update=f"{update} => {update}; {line}"))


@pytest.mark.parametrize("kind", ["cohere", "glm4", "qwen3_moe", "smollm3", "olmo3", "gpt_neox", "phi", "llama4_text"])
def test_types_that_nobody_listed_are_admitted(kind: str) -> None:
    check_works(small_model(kind))


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("diffllama", "attended to 2 times for a token, not once"),
        ("gpt2", "does not rotate its keys"),
        ("gptj", "computes attention in its own way"),
        ("inkling_text", "a bias of its own to each head"),
        ("rwkv", "does not say how many KV heads"),
        ("minimax_m3_vl_text", "more than keys and values"),
        ("deepseek_v3", "attention"),
        ("jetmoe", "calls repeat on them"),
        ("ministral", "no layer of this model has full attention"),
    ],
)
def test_a_refusal_names_what_is_missing_and_what_works(kind: str, missing: str) -> None:
    with pytest.raises(ModelError, match=missing) as refusal:
        KeepCache(small_model(kind, torch.float32))
    assert any(word in str(refusal.value) for word in ("transformers' own cache", "nothing can be compressed"))


def test_the_check_is_run_once_for_a_class_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    first, same, other = make_model(), make_model(seed=1), make_model(num_hidden_layers=2)
    KeepCache(first)
    with monkeypatch.context() as patch:
        patch.setattr(self_check, "_tried", None)  # would fail if it were called again
        KeepCache(same)
        KeepCache(first, "10%")
        KeepCache(other, check=False)
    assert len(self_check._verdicts) == 1
    KeepCache(other)
    assert len(self_check._verdicts) == 2


def test_a_refusal_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("diffllama")
    for _ in range(2):
        with pytest.raises(ModelError, match="attended to 2 times"):
            KeepCache(model)
        monkeypatch.setattr(self_check, "_tried", None)


def test_check_false_skips_the_check() -> None:
    cache = KeepCache(small_model("diffllama"), check=False)
    assert len(cache.rotations) == len(cache.layers)
    assert self_check._verdicts == {}


def test_a_model_in_training_is_checked_without_dropout_and_stays_in_training() -> None:
    model = make_model(attention_dropout=0.5).train()
    model.get_decoder().layers[1].eval()
    KeepCache(model)
    assert model.training
    assert not model.get_decoder().layers[1].training
    assert model.get_decoder().layers[2].training


def test_large_models_are_tried_on_their_first_layers() -> None:
    """The comparison of attention ends behind the first layers of every kind."""
    model = make_model(num_hidden_layers=12)
    calls = []
    attention = model.get_decoder().layers[2].mlp
    attention.register_forward_hook(lambda *_: calls.append(1))
    KeepCache(model)
    assert len(calls) == 1  # only the tokens that are read alone, for the rotation of every layer


@pytest.mark.parametrize("kind", ["glm4", "mixtral", "smollm3", "cohere2", "llama4_text", "phi"])
def test_other_types_repeat_fold_pad_and_search_as_llama_does(kind: str) -> None:
    """With a budget that keeps everything each of these gives what transformers' cache gives; smaller ones are finite."""
    model = small_model(kind)
    ids = tokens(1, 60)
    for budget in (1.0, "25%"):
        repeated = KeepCache(model, budget, "kvzip", chunk=24, period=24).read(model, ids[:, :50], repeat=ids[:, :3])
        logits = model(ids[:, 50:], past_key_values=repeated).logits
        assert logits.isfinite().all()
        if budget == 1.0:
            expected = model(ids).logits[:, 50:]
            torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))

    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[0, :7] = 0
    rows = torch.cat([ids[:, :50].masked_fill(mask[:1] == 0, 2), tokens(1, 50, seed=1)])
    padded = KeepCache(model, 1.0).read(model, rows, mask)
    alone = KeepCache(model, 1.0).read(model, rows[:1, 7:])
    step = {"attention_mask": torch.cat([mask, mask[:, -1:]], 1), "position_ids": torch.tensor([[43], [50]])}
    got = model(ids[:, 50:51].expand(2, -1), past_key_values=padded, **step).logits[:1]
    expected = model(ids[:, 50:51], past_key_values=alone).logits
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))

    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    found = model.generate(ids, past_key_values=KeepCache(model, 1.0), **options)
    assert torch.equal(found, model.generate(ids, **options))
