"""Rotations as values: against complex numbers in float64."""

from __future__ import annotations

import pytest
import torch

from helpers import randn64
from keepkv.ops.rope import Rotation

FREQUENCIES = torch.tensor([1.0, 0.3, 0.01])


@pytest.mark.parametrize(("first", "second"), [(slice(0, 3, 1), slice(3, 6, 1)), (slice(0, 6, 2), slice(1, 6, 2))])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_pair_is_a_complex_number(first: slice, second: slice, sign: int) -> None:
    rotation = Rotation(first, second, sign * FREQUENCIES)
    x, shift = randn64(2, 5, 8), torch.tensor([0, 1, -7, 500, 100_000])
    got = rotation.rotate(x, shift)
    turned = torch.complex(x[..., first], x[..., second]) * torch.exp(1j * sign * shift[:, None] * FREQUENCIES.double())
    torch.testing.assert_close(torch.complex(got[..., first], got[..., second]), turned)
    assert torch.equal(got[..., 6:], x[..., 6:])  # the others stay
    torch.testing.assert_close(rotation.rotate(got, -shift), x)


def test_a_mean_of_rotations_is_the_mean_of_what_is_rotated() -> None:
    rotation = Rotation.halves(FREQUENCIES)
    x, shift = randn64(4, 8), torch.arange(30)
    angle = rotation.angles(shift)
    got = rotation.turn(x, angle.cos().mean(0), angle.sin().mean(0))
    every = torch.stack([rotation.rotate(x, torch.full((4,), int(by))) for by in shift])
    torch.testing.assert_close(got, every.mean(0))


def test_without_frequencies_nothing_moves() -> None:
    x = randn64(4, 8)
    assert torch.equal(Rotation.none().rotate(x, torch.arange(4)), x)
