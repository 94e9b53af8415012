"""keepkv's attention function: models that run eager or flex attention, with capped logits and sinks, against transformers."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.llama import modeling_llama

from helpers import make_model, small_model, tokens
from keepkv import KeepCache, ModelError, methods
from keepkv.cache import self_check
from keepkv.cache.attention_function import OURS, lead_to_caches
from keepkv.models import families
from keepkv.observe.references import window_shares

SUNK, CAPPED = "gpt_oss", "gemma2"


def sharp(kind: str, **changes: object) -> PreTrainedModel:
    """A small model of this type with logits that its cap bends, or sinks that take much."""
    model = small_model(kind, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(6)
            if "sinks" in name:
                parameter.add_(2)
    return model


def eager_weights(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """The shares that transformers' own eager attention computes, layer by layer, [H × G, T, T]."""
    config = model.config.get_text_config(decoder=True)
    before, config._attn_implementation = config._attn_implementation, "eager"
    weights = model(ids, output_attentions=True).attentions
    config._attn_implementation = before
    return [x[0].double() for x in weights]


def test_importing_keepkv_registers_nothing() -> None:
    code = "import keepkv, transformers as t; print([n for n in t.AttentionInterface().valid_keys() if 'keepkv' in n])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_model_that_runs_sdpa_is_left_alone() -> None:
    model = make_model()
    KeepCache(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_refused_model_runs_what_it_ran_before() -> None:
    model = small_model("gemma2", torch.float32)
    original = self_check._tried
    try:
        self_check._tried = lambda *_: (_ for _ in ()).throw(ModelError("no"))
        self_check._verdicts.clear()
        with pytest.raises(ModelError, match="no"):
            KeepCache(model)
    finally:
        self_check._tried = original
        self_check._verdicts.clear()
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["llama", SUNK, CAPPED])
def test_an_eager_model_computes_the_same_with_every_other_cache(kind: str) -> None:
    model = (make_model() if kind == "llama" else sharp(kind)).float()  # in float64, masked rows are NaN in transformers
    model.set_attn_implementation("eager")
    ids = tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    plain = model(ids, attention_mask=mask, output_attentions=True)
    cached = model(ids, past_key_values=DynamicCache(config=model.config)).logits
    KeepCache(model)
    assert model.config._attn_implementation == OURS["eager"] in AttentionInterface().valid_keys()
    assert OURS["eager"] in AttentionMaskInterface().valid_keys()
    after = model(ids, attention_mask=mask, output_attentions=True)
    assert torch.equal(after.logits, plain.logits)
    assert all(torch.equal(a, b) for a, b in zip(after.attentions, plain.attentions, strict=True))
    assert torch.equal(model(ids, past_key_values=DynamicCache(config=model.config)).logits, cached)


@pytest.mark.parametrize("kind", ["llama", SUNK, CAPPED])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_with_every_token_kept_it_is_bit_for_bit_transformers_cache(kind: str, dtype: torch.dtype) -> None:
    model = (make_model() if kind == "llama" else sharp(kind)).to(dtype)
    model.set_attn_implementation("eager")
    ids, full, ours = tokens(1, 70), DynamicCache(config=model.config), KeepCache(model, 1.0)
    for part in (ids[:, :50], ids[:, 50:51], ids[:, 51:]):
        assert torch.equal(*(model(part, past_key_values=cache).logits for cache in (full, ours)))


@pytest.mark.parametrize("kind", [SUNK, CAPPED])
@pytest.mark.parametrize("slots", [60, 24])
def test_slots_are_attended_as_transformers_attends_to_their_tokens(kind: str, slots: int) -> None:
    """Against eager attention with a mask that hides what lost its slot from the tokens that came after it."""
    model, ids = sharp(kind), tokens(1, 80)
    cache = KeepCache(model, slots, "streaming", slot_dtype="float", auto=False)
    model(ids[:, :60], past_key_values=cache)
    cache = cache.compress() if slots < 60 else self_check._in_slots(cache)
    got = model(ids[:, 60:], past_key_values=cache).logits
    full = torch.ones(80, 80, dtype=torch.bool).tril()
    near = full.triu(1 - model.config.sliding_window)
    kept = cache.keep_layers[0].slots.positions[:slots].long()
    full[60:, :60] = torch.zeros(60, dtype=torch.bool).index_fill(0, kept, True)
    masks = {"full_attention": full, "sliding_attention": near}
    masks = {name: torch.where(mask, 0.0, -torch.inf).double()[None, None] for name, mask in masks.items()}
    expected = model(ids, attention_mask=masks).logits[:, 60:]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # eager rounds its shares to float32


@pytest.mark.parametrize("kind", [SUNK, CAPPED])
def test_what_is_observed_is_what_transformers_computes(kind: str) -> None:
    """Summed attention, shares of the newest queries, and references: against eager attention's own weights."""
    model, ids = sharp(kind), tokens(1, 60)
    cache = KeepCache(model, method="h2o", auto=False)
    model(ids, past_key_values=cache)
    weights = eager_weights(model, ids)
    context = methods.get("keepkv").references
    for layer, seen in zip(cache.keep_layers, cache.observations(), strict=True):
        own = weights[layer.watch.layer].unflatten(0, (layer.heads, -1))  # [H, G, T, T]
        torch.testing.assert_close(seen.column_mass.double(), own.sum(2).mean(1), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(window_shares(seen, 20).double(), own[:, :, -20:], rtol=1e-3, atol=1e-5)
        made = context(seen)
        newest = own.flatten(1, 2)  # the window: all queries of a text this short
        rows = slice(made.queries.shape[1] - newest.shape[1], None)
        values = layer.values[0].double()
        torch.testing.assert_close(made.outputs[:, rows].double(), newest @ values, rtol=1e-3, atol=1e-4)
        if kind == SUNK:
            torch.testing.assert_close(made.sink_share[:, rows].double(), 1 - newest.sum(-1), rtol=1e-3, atol=1e-4)
        else:
            assert made.sink_share is None


@pytest.mark.parametrize("kind", [SUNK, CAPPED])
def test_shares_and_sinks_are_the_whole(kind: str) -> None:
    """Of every reference row, future ones too: what its entries and its sink have is 1, and the outputs are theirs."""
    cache = KeepCache(model := sharp(kind), auto=False)
    model(tokens(1, 100), past_key_values=cache)
    for seen in cache.observations():
        seen = vars(seen) | {"references": methods.get("keepkv").references(seen)}
        rows = type(cache.observations()[0])(**seen).rows(slice(0, 2))
        share = rows.share(torch.arange(100).expand(2, -1))
        torch.testing.assert_close(share.sum(2) + rows.sunk, torch.ones_like(share[..., 0]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(share @ seen["values"].float(), rows.outputs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [SUNK, CAPPED])
def test_the_repetition_sees_what_transformers_computes(kind: str) -> None:
    """As if 60 more tokens stood between, which no window reaches across: see tests/observe/test_repetition.py."""
    model, ids = sharp(kind, num_hidden_layers=2), tokens(1, 40)
    cache = KeepCache(model, auto=False)
    model(ids, past_key_values=cache)
    again = cache.fork()
    again.repeat(model, ids)
    index, layer = next((n, x) for n, x in enumerate(again.layers) if x in again.keep_layers)
    weights = eager_weights(model, torch.cat([ids, ids], 1))[index]
    peak = weights[:, 40:, :40].unflatten(0, (layer.heads, -1)).amax((1, 2))
    before = 0 if index == 0 else model.config.sliding_window  # a window before it sees the text at both places
    near = (layer.watch.repeat_peak.double() - peak).abs().max() / peak.max()
    assert near < (1e-3 if not before else 0.5)


@pytest.mark.parametrize("kind", [SUNK, CAPPED])
@pytest.mark.parametrize("method", ["keepkv", "snapkv", "attention-matching", "expected", "h2o", "kvzip", "defensivekv"])
def test_methods_lose_less_with_more_slots(kind: str, method: str) -> None:
    model, ids = sharp(kind), tokens(1, 150)
    later = ids[:, 120:]
    full = DynamicCache(config=model.config)
    model(ids[:, :120], past_key_values=full)
    expected = model(later, past_key_values=full).logits
    errors = []
    for budget in (16, 110):
        cache = KeepCache(model, budget, method).read(model, ids[:, :120])
        errors.append(float((model(later, past_key_values=cache).logits - expected).norm() / expected.norm()))
    assert errors[1] < 0.7 * errors[0]


def test_a_model_whose_function_adds_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias by distance is in the model's own attention, and in no slot: the check of slots sees it."""
    model = make_model()
    model.set_attn_implementation("eager")
    own = modeling_llama.eager_attention_forward
    assert "softcap" not in inspect.signature(own).parameters

    def biased(module, query, key, value, attention_mask, scaling, **more):
        distance = torch.arange(key.shape[2], dtype=query.dtype) * 0.3
        return own(module, query, key, value, attention_mask + distance, scaling, **more)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", biased)
    monkeypatch.setattr(self_check, "_verdicts", {})
    with pytest.raises(ModelError, match="with every token in a slot of its own"):
        KeepCache(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore::DeprecationWarning")
def test_flex_attention_gives_what_sdpa_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled here, which takes half a minute."""

    def plain(query, key, value, training=False, **more):
        return flex_attention(query, key, value, **more)

    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", plain)
    monkeypatch.setattr(
        "transformers.masking_utils.create_block_mask", lambda *a, _compile, **more: create_block_mask(*a, **more)
    )
    model = make_model(dtype=torch.float32).requires_grad_(False)
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.int64)
    mask[0, :9] = 0
    caches = {}
    for way in ("sdpa", "flex_attention"):
        model.set_attn_implementation(way)
        caches[way] = cache = KeepCache(model, 24, check=False).read(model, ids[:, :50], mask[:, :50])
        step = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, 50:]}
        caches[way] = model(ids[:, 50:], past_key_values=cache, **step).logits
    assert model.config._attn_implementation == OURS["flex_attention"]
    torch.testing.assert_close(*caches.values(), rtol=1e-2, atol=1e-2)


def test_a_model_without_the_interface_is_refused() -> None:
    model = small_model("gptj", torch.float32)
    families.check_supported(model)
    with pytest.raises(ModelError, match="not through transformers' attention interface"):
        lead_to_caches(model)
    assert model.config._attn_implementation == "eager"
