"""Compression of a layer's heads: together they give what they give one by one, with as many launches however many they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import randn
from keepkv import choose, methods
from keepkv.attend import dispatch
from keepkv.compress import Compressed, Way, compress, compress_in_ways
from keepkv.merge import per_head
from keepkv.observe.references import context
from keepkv.ops.rope import Rotation
from keepkv.slots.slot_dtype import FLOAT, SLOT_DTYPES
from keepkv.types import Choice, Observation


def observed(heads: int, tokens: int = 300, layer: int = 0, voted: bool = False) -> Observation:
    """Groups of alike tokens; voted: as after an earlier compression, heads with different numbers of entries."""
    centre = 2 * randn(heads, 9, 16, seed=layer)
    keys = centre[:, torch.arange(tokens) % 9] + 0.5 * randn(heads, tokens, 16, seed=layer + 1)
    values, queries = randn(heads, tokens, 16, seed=layer + 2), randn(heads, 2, 128, 16, seed=layer + 3)
    peak = torch.rand(heads, tokens, generator=torch.Generator().manual_seed(layer + 4)).pow(8)
    seen = Observation(
        keys, values, queries, torch.arange(tokens - 128, tokens), Rotation.halves(torch.ones(8)), 0.25, layer, repeat_peak=peak
    )
    if voted:
        bias = torch.rand(heads, tokens, generator=torch.Generator().manual_seed(layer + 5))
        bias[torch.arange(tokens) < 20 * torch.arange(heads)[:, None]] = -torch.inf
        places = torch.arange(tokens).expand(heads, -1).masked_fill(bias.isneginf(), -1)
        seen = replace(seen, bias=bias, key_positions=places, read=tokens)
    return seen


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch):
    """All heads of a layer in one group, as on a GPU."""

    def patch() -> None:
        for module in (dispatch, choose, per_head):
            monkeypatch.setattr(module, "groups", lambda heads, device, size: [slice(0, heads)])

    return patch


@pytest.mark.parametrize("voted", [False, True])
@pytest.mark.parametrize("name", ["keepkv", "attention-matching"])
def test_heads_together_are_as_heads_alone(name: str, voted: bool, together) -> None:
    seen, row = observed(4, voted=voted), methods.get(name)
    keep = torch.zeros(4, 300, dtype=torch.bool)
    keep[1, [100, 250]] = True

    def made():
        watched = replace(seen, references=context(seen), keep=keep)
        scores = row.score(watched).masked_fill(~watched.present, -torch.inf).masked_fill(keep, torch.inf)
        choices = row.choose(watched, scores, [30, 7, 60, watched.counts[3]])
        return watched, choices, row.merge(watched, choices)

    alone = made()
    together()
    at_once = made()
    torch.testing.assert_close(at_once[0].references.rms_share, alone[0].references.rms_share)
    torch.testing.assert_close(at_once[0].references.outputs, alone[0].references.outputs)
    for head, (ours, theirs) in enumerate(zip(at_once[1], alone[1], strict=True)):
        assert torch.equal(ours.kept, theirs.kept)
        ours, theirs = at_once[2][head], alone[2][head]
        for x, y in zip(ours[:3], theirs[:3], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
        assert ours.fallbacks == theirs.fallbacks
        assert ours[4:] == pytest.approx(theirs[4:], rel=1e-3)


def test_a_head_with_nothing_to_fit_is_left_alone_beside_others(together) -> None:
    together()
    seen = observed(3)
    seen = replace(seen, references=context(seen))
    everything, none, some = torch.arange(300), torch.arange(0), torch.arange(0, 300, 9)
    made = methods.get("keepkv").merge(seen, [Choice(everything), Choice(none), Choice(some)])
    assert torch.equal(made[0].values, seen.values[0])
    assert made[0].bias.eq(0).all()
    assert len(made[1].keys) == 0
    assert made[2].bias.ne(0).all()
    assert [one.fallbacks for one in made] == [0, 0, 0]


class Counted(TorchDispatchMode):
    """Counts operators, views left out: what would be launched on a GPU, and what would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_launches_do_not_grow_with_the_heads_and_nothing_waits_for_a_head(together) -> None:
    together()
    counted = {}
    for heads in (2, 12):
        layers = [observed(heads, layer=layer) for layer in range(2)]
        with Counted() as mode:
            compress(layers, methods.get("keepkv"), 30 * heads * 2)
        counted[heads] = mode.calls
    few, many = (sum(calls.values()) for calls in counted.values())
    assert many < 1.1 * few
    for waits in ("_local_scalar_dense", "nonzero", "masked_select"):
        assert counted[12][waits] <= counted[2][waits]


def test_a_score_knows_how_many_slots_there_will_be() -> None:
    told = []

    def score(observation: Observation) -> torch.Tensor:
        told.append(observation.slots)
        return observation.positions.float()

    compress([observed(2), observed(2, layer=1)], methods.Method("newest", "", "", score), 90)
    assert told == [22.5, 22.5]


def parts(made: Compressed) -> list[torch.Tensor]:
    """All tensors of what a compression made."""
    of_slots = [tensor for slots in made.slots for tensor in slots.tensors]
    of_heads = [tensor for layer in made.merged for head in layer for tensor in head[:3]]
    return [*of_slots, *of_heads, *(head for layer in made.plan.kept for head in layer)]


@pytest.mark.parametrize("name", ["keepkv", "keepkv-paper", "snapkv", "minicache"])
def test_each_of_several_ways_is_as_if_alone_bit_for_bit(name: str) -> None:
    """Also those that keep everything, in which nothing is chosen, and those of fewer slots than a trial has."""
    layers, method = [observed(2, layer=layer) for layer in range(4)], methods.get(name)
    if method.layer_pairs:
        ways = [Way(FLOAT, slots * 8) for slots in (20, 40)]
    else:
        named = [("int8", 60), ("int4", 110), ("float", 300), ("int4", 8), ("int8", 300), ("float", 36), ("int4", 0)]
        ways = [Way(SLOT_DTYPES[slot_dtype], slots * 8) for slot_dtype, slots in named]
    together = compress_in_ways(layers, method, ways)
    for way, ours in zip(ways, together, strict=True):
        theirs = compress(layers, method, way.total, slot_dtype=way.slot_dtype)
        for x, y in zip(parts(ours), parts(theirs), strict=True):
            assert torch.equal(x, y)
        assert [head[3:] for layer in ours.merged for head in layer] == [head[3:] for layer in theirs.merged for head in layer]
        assert [slots.offsets for slots in ours.slots] == [slots.offsets for slots in theirs.slots]
        assert [type(slots.keys) for slots in ours.slots] == [type(slots.keys) for slots in theirs.slots]


def test_several_ways_score_once_and_try_once() -> None:
    """A third way costs its own merges and nothing else; all steps are reported."""
    called: Counter[str] = Counter()
    row = methods.get("keepkv")

    def counted(name: str):
        def call(*args):
            called[name] += 1
            return getattr(row, name)(*args)

        return call

    counting = {name: counted(name) for name in ("score", "references", "merge")}
    method, layers = replace(row, **counting), [observed(2, layer=layer) for layer in range(3)]
    for ways in (1, 3):
        called.clear()
        steps: list[tuple[int, int]] = []
        names = ["int8", "int4", "int2"][:ways]
        asked = [Way(SLOT_DTYPES[name], 50 * 6) for name in names]
        compress_in_ways(layers, method, asked, lambda done, of, steps=steps: steps.append((done, of)))
        assert called == {"score": 3, "references": 3, "merge": 2 * 3 + 3 * ways}
        assert steps == [(n, 3 * (2 + ways)) for n in range(1, 3 * (2 + ways) + 1)]


def test_a_text_too_short_for_trials_reports_all_its_steps() -> None:
    steps: list[tuple[int, int]] = []
    layers = [replace(observed(2, layer=layer), keep=torch.arange(300).expand(2, -1) < 280) for layer in range(3)]
    compress(layers, methods.get("keepkv"), 290 * 6, lambda done, of: steps.append((done, of)))
    assert steps == [(n, 9) for n in range(1, 10)]
