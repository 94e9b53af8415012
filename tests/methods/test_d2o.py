"""D2O: layers of even attention get more, and similar tokens are merged."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from helpers import randn64
from keepkv.methods import d2o
from keepkv.types import Choice


def test_d2o_gives_more_to_layers_of_even_attention_and_spares_three_if_it_can() -> None:
    scores = torch.rand(6, 2, 100)
    scores[2, 0, 7] = 50.0
    scores[2, 1, :2] = 50.0  # both heads of layer 2 vary as much as one head can against the other
    scores[3] = torch.rand(2, 100) * torch.tensor([[1.0], [0.0]])  # one head of layer 3 varies, one does not
    small = [sum(layer) for layer in d2o.steady_layers(scores, 240)]
    assert sum(small) == 240
    crowded = d2o.steady_layers(scores, 1110)  # three whole layers would be more than half of it
    assert sum(map(sum, crowded)) == 1110
    assert crowded[0] != [100, 100]
    whole = d2o.steady_layers(torch.rand(9, 2, 100), 1250)
    assert whole[0] == whole[1] == whole[8] == [100, 100]
    assert sum(map(sum, whole)) == 1250
    variance = scores.var(-1, unbiased=False)
    spread = (variance - variance.amin(1, keepdim=True)) / (
        variance.amax(1, keepdim=True) - variance.amin(1, keepdim=True) + 1e-6
    )
    weights = (-spread.mean(1)).exp()
    torch.testing.assert_close(torch.tensor(small) / 240, weights / weights.sum(), rtol=0, atol=0.02)


def test_d2o_merges_what_is_more_similar_than_the_mean_and_drops_the_rest() -> None:
    keys, values = randn64(40, 16, seed=8), randn64(40, 8, seed=9)
    kept = torch.arange(0, 40, 5)
    made = d2o.merge_by_cosine(keys, values, Choice(kept), torch.zeros(40))
    near = normalize(keys, dim=1) @ normalize(keys[kept], dim=1).T
    gone = torch.ones(40, dtype=torch.bool).index_fill(0, kept, False)
    best, into = near.max(1)
    joins = gone & (best >= best[gone].mean())
    assert 0 < joins.sum() < gone.sum()
    for slot, token in enumerate(kept.tolist()):
        members = [token, *(joins & (into == slot)).nonzero().flatten().tolist()]
        weight = torch.tensor([1.0, *(float(best[m]) for m in members[1:])], dtype=torch.float64).exp()
        weight = weight / weight.sum()
        torch.testing.assert_close(made.keys[slot], weight @ keys[members])
        torch.testing.assert_close(made.values[slot], weight @ values[members])
    assert made.bias.abs().max() == 0
