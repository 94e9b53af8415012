"""The field's methods: each one's defining property, against its equation in float64."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import normalize

from conftest import make_model, tokens
from keepkv import KeepCache, KeepKVError, MethodError, allot, choose, methods, score
from keepkv.attend.states import exact
from keepkv.cache.report import held_bytes
from keepkv.merge import merged
from keepkv.methods import (
    attention_matching,
    cam,
    chelsea,
    criticalkv,
    d2o,
    keydiff,
    knorm,
    kvmerger,
    pyramidinfer,
    pyramidkv,
    registry,
    rkv,
    streaming,
    tova,
)
from keepkv.observe import references
from keepkv.observe.repetition import Repeat, attend_piece
from keepkv.ops.rope import rotate
from keepkv.slots import layer_pairs
from keepkv.slots.slots import Slots
from keepkv.types import Choice, Observation

INF = torch.inf
INV_FREQ = 1 / 100 ** (torch.arange(8) / 8)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(count: int = 60, heads: int = 2, **more: object) -> Observation:
    """A layer that read `count` tokens: two KV heads of three query heads each, head size 16."""
    keys, values = randn(heads, count, 16).float(), randn(heads, count, 16, seed=1).float()
    queries = 2 * randn(heads, 3, count, 16, seed=2).float()
    return replace(Observation(keys, values, queries, torch.arange(count), INV_FREQ, 0.25), **more)


def shares(observation: Observation, window: int) -> torch.Tensor:
    """Causal softmax shares [H, G, w, T] of the last queries, float64."""
    queries, keys = observation.queries.double()[:, :, -window:], observation.keys.double()
    logits = observation.scale * queries @ keys[:, None].transpose(-1, -2)
    count = keys.shape[1]
    hidden = torch.ones(count, count, dtype=torch.bool).triu(1)[-window:]
    return logits.masked_fill(hidden, -INF).softmax(-1)


# --- scores ---


def test_tova_scores_by_the_last_query_over_all_heads_and_keeps_the_same_tokens_in_all() -> None:
    observation = seen()
    got, wanted = tova.last_query(observation), shares(observation, 1).mean((0, 1, 2))
    for head in got:
        torch.testing.assert_close(head.double(), wanted, rtol=1e-4, atol=1e-7)
    cache = KeepCache(make_model("llama", torch.float32), 0.3, "tova")
    make_model("llama", torch.float32)(tokens(1, 80), past_key_values=cache)
    for layer in cache.keep_layers:
        first, second = (
            layer.slots.positions[lo:hi] for lo, hi in zip(layer.slots.offsets, layer.slots.offsets[1:], strict=False)
        )
        assert torch.equal(first, second)
        assert int(first[-1]) == 79


def test_snapkv_pools_the_windows_mean_share_and_keeps_the_window() -> None:
    observation = seen()
    got, mean = score.pooled_window(observation), shares(observation, 32).mean((1, 2))[:, :28]
    for place in (0, 5, 13, 27):
        near = mean[:, max(0, place - 2) : place + 3]
        torch.testing.assert_close(got[:, place].double(), near.sum(1) / 5, rtol=1e-4, atol=1e-7)
    assert got[:, 28:].isposinf().all()


def test_knorm_and_keydiff_need_no_query() -> None:
    observation = seen(queries=torch.full((2, 3, 60, 16), torch.nan))
    keys = observation.keys.double()
    torch.testing.assert_close(knorm.small_keys(observation).double(), -keys.norm(dim=-1), rtol=1e-5, atol=1e-6)
    mean = normalize(keys, dim=-1).mean(1, keepdim=True)
    wanted = -torch.cosine_similarity(keys, mean, dim=-1)
    torch.testing.assert_close(keydiff.distinct_keys(observation).double(), wanted, rtol=1e-4, atol=1e-6)


def test_pyramidinfer_weighs_the_newest_fifth_of_queries() -> None:
    observation = seen()
    share = shares(observation, 12)  # a fifth of 60
    wanted = (share * torch.linspace(1, 1.2, 12).double()[:, None]).sum(2).mean((0, 1))
    for head in pyramidinfer.newest_fifth(observation):
        torch.testing.assert_close(head.double(), wanted, rtol=1e-4, atol=1e-6)


def test_r_kv_is_importance_less_redundancy() -> None:
    observation = seen()
    got, keys = rkv.joint(observation), observation.keys.double()
    for head in range(2):
        logits = 0.25 * (observation.queries.double()[head, :, -8:] @ keys[head].T).amax(0)[:, :52]
        important = logits.softmax(-1).mean(0)
        pooled = torch.stack([important[max(0, i - 3) : i + 4].max() for i in range(52)])
        near = torch.cosine_similarity(keys[head][:, None], keys[head][None], dim=-1).fill_diagonal_(0)
        for row in near:
            alike = (row > 0.5).nonzero().flatten()
            if len(alike):
                row[alike[-1]] = 0
        redundant = near.mean(0).softmax(0)[:52]
        torch.testing.assert_close(got[head, :52].double(), 0.1 * pooled - 0.9 * redundant, rtol=1e-3, atol=1e-6)
    assert got[:, 52:].isposinf().all()


def test_r_kv_keeps_the_last_of_equal_tokens() -> None:
    keys = randn(1, 60, 16, seed=5).float()
    keys[0, [10, 20, 30]] = keys[0, 10].clone()
    got = rkv.joint(replace(seen(heads=1), keys=keys), weight=0.0)[0]
    assert got[30] > got[20]
    assert got[30] > got[10]


# --- budgets ---


def test_pyramid_budgets_fall_on_a_line_to_a_twentieth() -> None:
    scores = torch.rand(7, 2, 400)
    scores[..., -20:] = INF
    counts = [layer[0] for layer in pyramidkv.pyramid(scores, 7 * 2 * 100)]
    assert sum(counts) == 700
    assert counts[-1] == pytest.approx(20 + 80 / 20, abs=1)
    steps = torch.tensor(counts).diff()
    assert steps.max() <= 0
    assert steps.max() - steps.min() <= 2
    crowded = [layer[0] for layer in pyramidkv.pyramid(scores, 7 * 2 * 300)]  # the first layer cannot have twice the average
    assert crowded[0] == 400
    assert sum(crowded) == 2100


def test_adakv_shares_a_layers_slots_among_its_heads_only() -> None:
    scores = torch.rand(3, 2, 100)
    scores[1, 1] *= 100
    counts = allot.within_layers(scores, 240)
    assert [sum(layer) for layer in counts] == [80, 80, 80]
    assert counts[1] == [8, 72]  # a fifth of 40 is safe
    everything = allot.within_layers(scores, 600)
    assert everything == [[100, 100]] * 3


def test_rules_for_all_heads_together_give_each_the_same() -> None:
    scores = torch.rand(4, 3, 50)
    for rule in (allot.together(allot.uniform), allot.together(allot.cosine_layers), allot.alike):
        for total in (121, 240, 600):
            counts = rule(scores, total)
            assert all(len(set(layer)) == 1 for layer in counts)
            assert total - 12 < sum(map(sum, counts)) <= total


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


# --- choices ---


def test_criticalkv_fills_its_second_half_by_what_leaving_out_may_change() -> None:
    projection = randn(2, 3, 16, 20, seed=3).float()
    observation, scores = seen(projection=projection), torch.rand(2, 60)
    scores[:, 59] = INF
    chosen = criticalkv.two_stages(observation, scores, [20, 21])
    for head, (choice, count) in enumerate(zip(chosen, (20, 21), strict=True)):
        loud = torch.stack([(observation.values[head] @ weight).abs().sum(1) for weight in projection[head]]).mean(0)
        first = scores[head].argsort(descending=True)[: count // 2]
        rest = (scores[head] + 1e-4) * loud
        rest[first] = INF
        assert choice.kept.tolist() == sorted(rest.argsort(descending=True)[:count].tolist())
        assert 59 in choice.kept


def test_kvmerger_parts_the_least_similar_neighbours_and_keeps_the_best_of_each_run() -> None:
    keys = randn(1, 60, 16, seed=4).float()
    observation, scores = replace(seen(heads=1), keys=keys), torch.rand(1, 60)
    scores[0, [0, 59]] = INF
    (choice,) = kvmerger.consecutive(observation, scores, [20], heavy=0.0)
    assert len(choice.kept) == 20
    run = choice.target
    assert run.tolist() == sorted(run.tolist())  # consecutive
    for index, kept in enumerate(choice.kept.tolist()):
        members = (run == index).nonzero().flatten()
        assert kept == int(members[scores[0, members].argmax()])
    cosine = torch.cosine_similarity(keys[0, 1:], keys[0, :-1], dim=-1)
    parted = run.diff() > 0
    inner = slice(1, 58)  # the first and the last token stand alone whatever the cosines
    assert cosine[inner][parted[inner]].max() <= cosine[inner][~parted[inner]].min()
    assert (run == 0).sum() == (run == 19).sum() == 1


def test_kvmergers_weights_are_gaussian_around_the_pivot() -> None:
    keys, values = randn(6, 16), randn(6, 8, seed=1)
    choice = Choice(torch.tensor([1, 5]), torch.tensor([0, 0, 0, 0, 0, 1]))
    made = kvmerger.gaussian(keys, values, choice, torch.zeros(6))
    g = (-(keys[:5] - keys[1]).square().sum(1) / 50).exp()
    torch.testing.assert_close(made.keys[0], (g[:, None] * keys[:5]).sum(0) / g.sum())
    torch.testing.assert_close(made.values[0], (g[:, None] * values[:5]).sum(0) / g.sum())
    assert torch.equal(made.keys[1], keys[5])
    assert made.bias.tolist() == [0, 0]
    torch.testing.assert_close(
        kvmerger.gaussian(keys, values, choice, torch.zeros(6), sized=True).values[0], 5 * made.values[0]
    )


@pytest.mark.parametrize("count", [5, 17, 30, 44, 59, 60])
def test_chelsea_meets_its_count_and_counts_every_token_once(count: int) -> None:
    observation, scores = seen(), torch.rand(2, 60)
    scores[:, [0, 30, 58, 59]] = INF
    chosen = chelsea.bipartite(observation, scores, [count, count], chunk=16)
    for head, choice in enumerate(chosen):
        assert len(choice.kept) == count
        made = chelsea.centroid(observation.keys[head].double(), observation.values[head].double(), choice)
        assert made.bias.exp().sum() == pytest.approx(60)
        for fixed in (0, 30, 58, 59):
            place = choice.kept.tolist().index(fixed)
            assert torch.equal(made.keys[place], observation.keys[head, fixed].double())
        logits = observation.queries[head, 0].double() @ made.keys.T
        full = observation.queries[head, 0].double() @ observation.keys[head].double().T
        assert ((logits + made.bias).logsumexp(1) <= full.logsumexp(1) + 1e-9).all()  # a mean key attends too quietly


def test_chelsea_merges_equal_neighbours_without_loss_for_every_query() -> None:
    keys, values = randn(1, 30, 16).repeat_interleave(2, 1), randn(1, 30, 8, seed=1).repeat_interleave(2, 1)
    observation = replace(seen(heads=1), keys=keys.float(), values=values.float())
    (choice,) = chelsea.bipartite(observation, torch.rand(1, 60), [30], chunk=16)
    made = chelsea.centroid(keys[0], values[0], choice)
    queries = randn(40, 16, seed=7)
    before = exact(queries, keys[0], values[0], torch.zeros(60), 1.0)
    for ours, theirs in zip(exact(queries, *made[:3], 1.0), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_chelsea_in_two_steps_weighs_by_degree() -> None:
    """Merging what was merged gives the mean over all tokens, not the mean of means."""
    keys, values = randn(7, 16), randn(7, 8, seed=1)
    first = chelsea.centroid(keys, values, Choice(torch.tensor([0, 5, 6]), torch.tensor([0, 0, 0, 0, 0, 1, 2])))
    second = chelsea.centroid(*first[:2], Choice(torch.tensor([0]), torch.tensor([0, 0, 0])), first.bias)
    torch.testing.assert_close(second.keys[0], keys.mean(0))
    torch.testing.assert_close(second.bias.exp(), torch.tensor([7.0]))


# --- merges ---


def test_d2o_merges_what_is_more_similar_than_the_mean_and_drops_the_rest() -> None:
    keys, values = randn(40, 16, seed=8), randn(40, 8, seed=9)
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


def test_cam_passes_values_on_one_by_one() -> None:
    values, mass = randn(30, 4), torch.rand(30, dtype=torch.float64)
    kept, chance, present = torch.tensor([0, 1, 25, 26, 27, 28, 29]), torch.rand(30).double(), torch.ones(30, dtype=torch.bool)
    got = cam.spread_values(values, kept, mass, chance, present, spread=4)
    naive = values.clone()
    for token in range(2, 25):
        if chance[token] < min(1.0, float(mass[token] / mass[token + 1 : token + 5].mean())):
            for later in range(token + 1, token + 5):
                naive[later] += naive[token] / 4
    torch.testing.assert_close(got, naive)
    assert torch.equal(got[29], values[29])  # four from the last dropped one reach 28
    assert torch.equal(cam.spread_values(values, kept, mass * 0, chance, present), values)  # no attention, no chance


def test_cam_keeps_keys_and_is_repeatable() -> None:
    observation = seen(column_mass=torch.rand(2, 60))
    choices = [Choice(torch.cat([torch.arange(2), torch.arange(40, 60)]))] * 2
    first, again = cam.followers(observation, choices), cam.followers(observation, choices)
    other = cam.followers(replace(observation, seed=1), choices)
    for head in range(2):
        assert torch.equal(first[head].keys, observation.keys[head, choices[head].kept])
        assert torch.equal(first[head].values, again[head].values)
    assert not torch.equal(first[0].values, other[0].values)


def test_streaming_closes_the_gap_between_sinks_and_window() -> None:
    """A query p after the text sees the sinks at their distance within the cache, and the window where it was."""
    observation = seen()
    kept = torch.tensor([0, 1, 2, 3, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59])
    (made, _) = streaming.closed_up(observation, [Choice(kept), Choice(kept)])
    torch.testing.assert_close(made.keys[4:], observation.keys[0, 50:])
    query = randn(1, 16, seed=3).float()
    near = rotate(query, torch.tensor([60]), INV_FREQ) @ made.keys[:4].T
    plain = rotate(observation.keys[0, :4], -torch.arange(4), INV_FREQ)  # the sinks without a position
    wanted = (
        rotate(query, torch.tensor([14]), INV_FREQ) @ rotate(plain, torch.arange(4), INV_FREQ).T
    )  # the cache has 14 entries
    torch.testing.assert_close(near, wanted, rtol=1e-4, atol=1e-4)


def test_streaming_shifted_again_and_again_is_as_shifted_once() -> None:
    model, ids = make_model("llama", torch.float64), tokens(1, 120)
    live = KeepCache(model, 24, "streaming-shifted", period=1, auto=False)
    once = KeepCache(model, 24, "streaming-shifted", auto=False)
    model(ids[:, :60], past_key_values=live)
    model(ids[:, :60], past_key_values=once)
    first = [layer.keys.clone() for layer in live.keep_layers]
    live.compress()
    again = live.fork().compress(20)  # what stands without gaps is not turned a second time
    once.compress(20)
    for ours, theirs, whole in zip(again.keep_layers, once.keep_layers, first, strict=True):
        assert torch.equal(ours.slots.positions, theirs.slots.positions)
        torch.testing.assert_close(ours.slots.keys, theirs.slots.keys, rtol=1e-5, atol=1e-5)
        assert not torch.equal(ours.slots.keys[:4], whole[0, 0, :4])


def test_attention_matching_recovers_the_output_where_nothing_is_missing() -> None:
    """Dropped entries that nobody attends to: votes 1, and the outputs of the reference rows are met."""
    keys, values, queries = randn(40, 16).float(), randn(40, 8, seed=1).float(), randn(300, 16, seed=2).float()
    kept = torch.arange(20)
    keys[20:], queries[:, 0] = 0, 10.0
    keys[20:, 0], keys[:20, 0] = -5.0, 0.0
    ref = references.attend_all(queries[None], keys[None], values[None])
    observation = Observation(keys[None], values[None], queries[None, None], torch.arange(300), INV_FREQ, 1.0, references=ref)
    made = attention_matching.match(values[None], [kept], observation.rows(slice(1)))[0]
    assert made.bias.abs().max() < 0.05
    ours, _ = exact(queries, *made[:3], 1.0)
    torch.testing.assert_close(ours, ref.outputs[0], rtol=0, atol=0.02)


def test_attention_matching_is_closer_than_eviction_within_its_bounds() -> None:
    keys, values, queries = randn(200, 16).float(), randn(200, 8, seed=1).float(), randn(800, 16, seed=2).float()
    ref = references.attend_all(queries[None], keys[None], values[None])
    observation = Observation(keys[None], values[None], queries[None, None], torch.arange(800), INV_FREQ, 1.0, references=ref)
    kept = choose.best(attention_matching.answered_most(observation)[0], 40)
    made, evicted = (
        attention_matching.match(values[None], [kept], observation.rows(slice(1)))[0],
        merged.evict(keys, values, kept),
    )
    errors = [(exact(queries, *slots[:3], 1.0)[0] - ref.outputs[0]).square().mean() for slots in (made, evicted)]
    assert errors[0] < 0.7 * errors[1]
    assert made.bias.abs().max() <= 3
    assert torch.equal(made.keys, keys[kept])
    whole = attention_matching.match(values[None], [torch.arange(200)], observation.rows(slice(1)))[0]
    assert torch.equal(whole.values, values)


# --- repetition ---


def test_kvzip_counts_shares_among_sinks_piece_and_repetition() -> None:
    keys, values, queries = randn(1, 50, 16), randn(1, 50, 16, seed=1), randn(1, 20, 16, seed=2)
    positions = torch.arange(40, dtype=torch.int32)
    draft = Slots(keys[0, :40], values[0, :40], torch.zeros(40), positions, (0, 40))
    output, peak = attend_piece(queries, keys, values, 10, draft, 20, 30, alone=True)
    hidden = torch.ones(10, 10, dtype=torch.bool).triu(1).repeat(2, 1)
    logits = queries[0] @ keys[0].T
    logits[:, 40:] = logits[:, 40:].masked_fill(hidden, -INF)
    torch.testing.assert_close(output[0], logits.softmax(1) @ values[0])
    counted = [*range(4), *range(20, 30), *range(40, 50)]
    torch.testing.assert_close(peak[0, 20:30], logits[:, counted].softmax(1)[:, 4:14].amax(0))


def test_kvzip_spends_where_the_repetition_asks_and_refuses_to_go_without() -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, 90)
    cache = KeepCache(model, 0.3, "kvzip").read(model, ids)
    repeated = KeepCache(model, auto=False)
    model(ids, past_key_values=repeated)
    repeated.repeat(model, ids, how=methods.get("kvzip").repeat)
    asked = torch.stack([layer.watch.repeat_peak for layer in repeated.keep_layers])
    kept = torch.zeros_like(asked, dtype=torch.bool)
    for index, layer in enumerate(cache.keep_layers):
        for head, (lo, hi) in enumerate(zip(layer.slots.offsets, layer.slots.offsets[1:], strict=False)):
            kept[index, head, layer.slots.positions[lo:hi].long()] = True
    free = torch.ones(90, dtype=torch.bool)
    free[:4] = False  # sinks always stay
    assert asked[..., free][kept[..., free]].min() >= asked[..., free][~kept[..., free]].max()
    plain = KeepCache(model, 0.3, "kvzip", auto=False)
    model(ids, past_key_values=plain)
    with pytest.raises(KeepKVError, match="repeat"):
        plain.compress()
    assert not plain.compressed


def test_a_repetitions_queries_are_those_of_its_tokens() -> None:
    model, ids = make_model("llama", torch.float32), tokens(1, 50)
    cache = KeepCache(model, auto=False)
    model(ids, past_key_values=cache)
    cache.repeat(model, ids, tokens(1, 5, seed=4), Repeat(chunk=20, draft=1, queries=True))
    twice = KeepCache(model, auto=False)
    model(torch.cat([ids, tokens(1, 5, seed=4), ids[:, :20]], 1), past_key_values=twice)
    layer, full = cache.keep_layers[0], twice.keep_layers[0]
    assert layer.watch.repeated.queries.shape[2] == 50 + 2 * 8  # pieces overlap by eight
    torch.testing.assert_close(
        layer.watch.repeated.queries[:, :, :20], full.watch.banked(full.state).banks[0].queries[:, :, -20:]
    )


# --- layers that share ---


def slots_of(keys: torch.Tensor, counts: tuple[int, ...] = (40, 20)) -> Slots:
    return Slots(keys, 2 * keys, torch.zeros(60), torch.arange(60, dtype=torch.int32), (0, counts[0], 60))


def test_minicache_restores_equal_directions_exactly_and_what_it_retains_bit_for_bit() -> None:
    x = randn(60, 64).float()
    y = 3 * x
    y[[7, 50]] = randn(2, 64, seed=3).float()
    lower, upper = layer_pairs.LayerPairs(start=0.5).pack([slots_of(x), slots_of(y)])
    alike = torch.ones(60, dtype=torch.bool)
    alike[[7, 50]] = False
    torch.testing.assert_close(lower.keys[:][alike], x[alike], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(upper.keys[:][alike], y[alike], rtol=1e-5, atol=1e-5)
    assert torch.equal(upper.keys[:][~alike], y[~alike])
    assert torch.equal(lower.values[:][~alike], 2 * x[~alike])


def test_minicache_mixes_along_the_sphere_and_keeps_every_norm() -> None:
    x, y = randn(60, 64, seed=1).float(), randn(60, 64, seed=2).float()
    lower, upper = layer_pairs.LayerPairs().pack([slots_of(x), slots_of(y)])
    torch.testing.assert_close(lower.keys[:].norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(upper.keys[:].norm(dim=1), y.norm(dim=1))
    one, other = normalize(x.double(), dim=1), normalize(y.double(), dim=1)
    direction, angle = layer_pairs.slerp(one, other, 0.6)
    torch.testing.assert_close((direction * one).sum(1).clamp(-1, 1).acos(), 0.6 * angle)
    torch.testing.assert_close((direction * other).sum(1).clamp(-1, 1).acos(), 0.4 * angle)
    for edge in (one, -one):  # no angle, and no one way
        assert layer_pairs.slerp(one, edge, 0.6)[0].isfinite().all()


def test_minicache_holds_directions_once_and_is_cut_without_being_read() -> None:
    x, y = randn(60, 64, seed=1).float(), randn(60, 64, seed=2).float()
    packed = layer_pairs.LayerPairs().pack([slots_of(x), slots_of(y)])
    together, apart = (
        held_bytes(t for part in packed for t in part.tensors),
        held_bytes(t for s in (slots_of(x), slots_of(y)) for t in s.tensors),
    )
    assert together < 0.6 * apart
    cut = packed[0].newest_off(5)
    assert cut.counts == [35, 15]
    assert torch.equal(cut.keys[:], torch.cat([packed[0].keys[:35], packed[0].keys[40:55]]))
    both = Slots.cat([packed[0], packed[0]])
    assert torch.equal(both.rows([1, 0], 2).keys[:], both.keys[:])
    assert held_bytes(both.tensors) < 1.2 * held_bytes(packed[0].tensors)  # stacking rows copies no direction


def test_minicache_keeps_the_same_tokens_in_both_layers_of_a_pair() -> None:
    model = make_model("llama", torch.float32, num_hidden_layers=4)
    cache = KeepCache(model, 0.3, "minicache")
    model(tokens(1, 200), past_key_values=cache)
    layers = [layer.slots for layer in cache.keep_layers]
    assert torch.equal(layers[1].positions, layers[2].positions)
    assert layers[1].keys.blocks[0].directions is layers[2].keys.blocks[0].directions
    assert not torch.equal(layers[0].positions, layers[1].positions)


# --- from outside ---


def test_a_row_is_registered_once_and_found_in_a_file(tmp_path, monkeypatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from keepkv import Method\nMINE = Method('mine', 'newest', 'nobody', lambda seen: seen.positions.float())\n"
    )
    monkeypatch.setattr(registry, "METHODS", dict(methods.METHODS))
    mine = methods.get(f"{file}:MINE")
    assert methods.get(f"{file}:MINE") is mine  # read once
    assert methods.register(mine) is methods.get("mine")
    with pytest.raises(MethodError, match="already"):
        methods.register(mine)
    for wrong in (f"{file}:YOURS", f"{tmp_path}/none.py:X", "no.such.module:X", f"{file}:Method"):
        with pytest.raises(MethodError):
            methods.get(wrong)


def test_every_row_says_what_it_costs_and_is_good_and_bad_at() -> None:
    for row in methods.METHODS.values():
        assert row.cost, row.name
        assert row.good, row.name
        assert row.bad, row.name
    assert json.dumps([row.name for row in methods.METHODS.values()])
    assert isinstance(methods.get("kvzip").allot, partial)


ALONE = [name for name, row in methods.METHODS.items() if not row.keeps_all and not (row.repeat and row.repeat.needed)]


@pytest.mark.parametrize("name", ALONE)
def test_a_row_of_a_left_padded_batch_is_compressed_as_if_alone(name: str) -> None:
    model, long, short = make_model("qwen3", torch.float32), tokens(1, 110), tokens(1, 70, seed=1)
    ids = torch.cat([long, torch.cat([torch.full((1, 40), 2), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    together = KeepCache(model, 0.3, name).read(model, ids, mask)
    for row, alone in enumerate((long, short)):
        cache = KeepCache(model, 0.3, name).read(model, alone)
        for ours, theirs in zip(together.keep_layers, cache.keep_layers, strict=True):
            part = ours.slots.rows([row], ours.heads)
            assert part.offsets == theirs.slots.offsets
            assert torch.equal(part.positions, theirs.slots.positions)
            torch.testing.assert_close(part.keys[:], theirs.slots.keys[:], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(part.values[:], theirs.slots.values[:], rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(part.bias, theirs.slots.bias, rtol=1e-2, atol=1e-2)
