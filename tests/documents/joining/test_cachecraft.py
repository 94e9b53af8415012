"""Cache-Craft's variants: the attention they paid, and their files."""

from __future__ import annotations

import pytest
import torch

from documents.joining.texts import LEAD, LENGTHS, _behind, documents, prompt
from helpers import make_model, tokens
from keepkv.documents.joining import cachecraft
from keepkv.documents.joining.cacheblend import ReusedText
from keepkv.documents.joining.joined import joined
from keepkv.errors import InputError
from keepkv.models import identity


def test_a_variant_counts_the_attention_it_paid_and_needs_no_repair_where_it_stood() -> None:
    model = make_model()
    parts = documents(model)
    first, second, third = parts
    whole = joined(model, parts[:2], 1.0).cache
    ids = third.ids[:, LEAD:]
    start = whole.get_seq_length()
    stood = cachecraft.observe(model, whole, [LENGTHS[0], start], ["a", "b"], ReusedText(ids, lambda i: (
        third.exact(i)[0][:, :, LEAD:], third.exact(i)[1][:, :, LEAD:])))  # fmt: skip
    assert stood.sizes == (LENGTHS[0], LENGTHS[1] - LEAD)
    assert stood.inter.shape == (3, ids.shape[1], 2)
    assert torch.allclose(stood.inter.sum(-1) + stood.intra, torch.ones(3, ids.shape[1]), atol=1e-5)

    model.set_attn_implementation("eager")  # the same from attention maps
    maps = model(prompt(), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for layer, told in enumerate(maps):
        paid = told[0, :, start:].mean(0)
        assert torch.allclose(stood.inter[layer, :, 0], paid[:, : LENGTHS[0]].sum(-1).float(), atol=1e-4)
        assert torch.allclose(stood.inter[layer, :, 1], paid[:, LENGTHS[0] : start].sum(-1).float(), atol=1e-4)

    assert 0.5 <= stood.impact < 1
    assert stood.overlap(["a", "b"]) == pytest.approx(1)
    assert stood.overhead(["a", "b"]) == pytest.approx(0, abs=1e-12)
    assert stood.overlap(["b", "a"]) == 0  # the other way round
    alone = stood.overlap(["a"])
    assert 0 < alone < 1
    assert stood.overlap(["x", "a"]) == alone
    assert stood.overlap(["x"]) == 0
    assert len(stood.chosen(["x"])) == -int(-stood.impact * ids.shape[1] // 1)
    paid = stood.inter.sum((0, 2))
    assert paid[stood.chosen(["x"])].min() >= paid.sort().values[ids.shape[1] - len(stood.chosen(["x"]))]
    other = cachecraft.observe(
        model, first.cache, [LENGTHS[0]], ["a"], ReusedText(ids, lambda i: tuple(x[:, :, LEAD:] for x in third.exact(i)))
    )
    assert cachecraft.best([stood, other], ["a", "b"]) is stood
    assert cachecraft.best([stood, other], ["a"]) is other

    again = joined(model, parts, 1.0, crafts=[[_behind(model, first, second)], [stood]], keys=["a", "b", "c"]).cache
    later = tokens(1, 4, seed=6)
    theirs = model(torch.cat([prompt(), later], 1)).logits[:, -4:]
    assert torch.allclose(model(later, past_key_values=again).logits, theirs, atol=1e-8)  # nothing was read again


def test_a_variant_comes_back_from_its_file(tmp_path) -> None:
    model = make_model(dtype=torch.float32)
    first, second, _ = documents(model)
    made, known = _behind(model, first, second), identity.of_model(model)
    cachecraft.save(made, tmp_path / "a.variant", known)
    again = cachecraft.load(tmp_path / "a.variant", known)
    assert (again.before, again.sizes, again.start, again.impact) == (made.before, made.sizes, made.start, made.impact)
    assert again.chosen(["x"]).tolist() == made.chosen(["x"]).tolist()
    for part in ("keys", "values", "taken"):
        assert all(map(torch.equal, getattr(again.recomputed, part), getattr(made.recomputed, part)))
    ours, theirs = (joined(model, [first, second], 1.0, crafts=[[v]], keys=["a", "b"]).cache for v in (made, again))
    later = tokens(1, 4, seed=6)
    assert torch.equal(model(later, past_key_values=ours).logits, model(later, past_key_values=theirs).logits)
    with pytest.raises(InputError, match="other weights"):
        cachecraft.load(tmp_path / "a.variant", identity.of_model(make_model(dtype=torch.float32, seed=4)))
    (tmp_path / "b.variant").write_bytes((tmp_path / "a.variant").read_bytes()[:-1])
    with pytest.raises(InputError, match="not a whole"):
        cachecraft.load(tmp_path / "b.variant", known)
