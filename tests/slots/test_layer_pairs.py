"""Slots of two layers that share directions, as MiniCache stores them."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from helpers import randn64
from keepkv.cache.report import held_bytes
from keepkv.slots import layer_pairs
from keepkv.slots.slots import Slots


def slots_of(keys: torch.Tensor, counts: tuple[int, ...] = (40, 20)) -> Slots:
    return Slots(keys, 2 * keys, torch.zeros(60), torch.arange(60, dtype=torch.int32), (0, counts[0], 60))


def test_minicache_restores_equal_directions_exactly_and_what_it_retains_bit_for_bit() -> None:
    x = randn64(60, 64).float()
    y = 3 * x
    y[[7, 50]] = randn64(2, 64, seed=3).float()
    lower, upper = layer_pairs.LayerPairs(start=0.5).pack([slots_of(x), slots_of(y)])
    alike = torch.ones(60, dtype=torch.bool)
    alike[[7, 50]] = False
    torch.testing.assert_close(lower.keys[:][alike], x[alike], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(upper.keys[:][alike], y[alike], rtol=1e-5, atol=1e-5)
    assert torch.equal(upper.keys[:][~alike], y[~alike])
    assert torch.equal(lower.values[:][~alike], 2 * x[~alike])


def test_minicache_mixes_along_the_sphere_and_keeps_every_norm() -> None:
    x, y = randn64(60, 64, seed=1).float(), randn64(60, 64, seed=2).float()
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
    x, y = randn64(60, 64, seed=1).float(), randn64(60, 64, seed=2).float()
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
