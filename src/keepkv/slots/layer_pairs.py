"""LayerPairs: two layers store their slots together. MiniCache, arXiv 2405.14366; `docs/theory.md 8.5`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.linalg import vector_norm

from keepkv.ops.dtypes import wide
from keepkv.slots.shared import Block, Shared
from keepkv.slots.slots import Slots


@dataclass(frozen=True)
class LayerPairs:
    """Neighboring layers of the upper half share the directions of their slots' vectors, two by two.

    For vectors x and y of the same token in the lower and the upper layer, at an angle Ω:

        e = [sin((1-t) Ω) x/||x|| + sin(t Ω) y/||y||] / sin Ω

    with t = .6. Then x is restored as ||x|| e and y as ||y|| e. This is done for keys and for values, head by head. The 5% with
    the largest angles are stored as they are. MiniCache, arXiv 2405.14366, section 4; `docs/theory.md 8.5`.

    Args:
        start: Pairs begin at this share of the depth.
        share: t, the way from the lower layer's direction to the upper one's.
        retain: The share of a head's slots that is stored as it is.
    """

    start: float = 0.5
    share: float = 0.6
    retain: float = 0.05

    def of(self, layers: int) -> list[tuple[int, int]]:
        """The pairs (lower, upper) of a model of so many layers.

        Example:
            >>> LayerPairs().of(6)
            [(2, 3), (4, 5)]
        """
        first = max(1, int(self.start * layers))
        return [(upper - 1, upper) for upper in range(first, layers, 2)]

    def cost(self, layers: int, vectors: int, beside: int) -> float:
        """The bytes of a slot as a share of those of a slot that shares nothing, mean over the layers.

        Args:
            layers: How many layers the model has.
            vectors: Bytes of a key and a value.
            beside: Bytes of a slot that are never shared.
        """
        paired = 2 * len(self.of(layers)) / layers
        return 1 - paired * self._saved(vectors) / (vectors + beside)

    def _saved(self, vectors: int) -> float:
        """Bytes that a slot of a pair saves: half of its vectors but for what is retained, less two norms and two places."""
        return max(0.0, vectors * (1 - self.retain) / 2 - 2 * 8)

    def tie(self, scores: Tensor) -> Tensor:
        """Scores [L, H, T] in which the two layers of a pair have the mean of both, since they must keep the same tokens."""
        tied = scores.clone()
        for lower, upper in self.of(len(scores)):
            tied[lower] = tied[upper] = (scores[lower] + scores[upper]) / 2
        return tied

    def pack(self, parts: Sequence[Slots]) -> list[Slots]:
        """All layers' slots of one sequence, with the directions of each pair stored once, where that saves anything."""
        packed = list(parts)
        for lower, upper in self.of(len(parts)):
            x, y = parts[lower], parts[upper]
            x_keys, x_values = x.keys[:], x.values[:]
            if self._saved(sum(vectors.shape[1] * vectors.element_size() for vectors in (x_keys, x_values))):
                lower_keys, upper_keys = self._pair(x_keys, y.keys[:], x.counts)
                lower_values, upper_values = self._pair(x_values, y.values[:], x.counts)
                packed[lower] = replace(x, keys=lower_keys, values=lower_values)
                packed[upper] = replace(y, keys=upper_keys, values=upper_values)
        return packed

    def _pair(self, x: Tensor, y: Tensor, counts: Sequence[int]) -> tuple[Shared, Shared]:
        """Vectors x and y [n, d] of the same tokens, over one pool of directions: what both share, x's own, then y's own."""
        dtype = wide(x.dtype)
        x_norm, y_norm = vector_norm(x.to(dtype), dim=1), vector_norm(y.to(dtype), dim=1)
        x_unit = x.to(dtype) / x_norm.clamp(min=1e-30)[:, None]
        y_unit = y.to(dtype) / y_norm.clamp(min=1e-30)[:, None]
        direction, angle = slerp(x_unit, y_unit, self.share)
        apart = torch.cat([_largest(head, int(self.retain * len(head))) for head in torch.split(angle, list(counts))])
        pool = torch.cat([direction[~apart].to(x.dtype), x[apart], y[apart]])
        own_count = int(apart.sum())
        shared_count = len(x) - own_count
        place = torch.empty(len(x), dtype=torch.int32, device=x.device)
        place[~apart] = torch.arange(shared_count, dtype=torch.int32, device=x.device)
        x_own = torch.arange(shared_count, len(x), dtype=torch.int32, device=x.device)
        lower = Block(pool, place.masked_scatter(apart, x_own), x_norm.masked_fill(apart, 1))
        upper = Block(pool, place.masked_scatter(apart, x_own + own_count), y_norm.masked_fill(apart, 1))
        return Shared((lower,)), Shared((upper,))


def _largest(x: Tensor, count: int) -> Tensor:
    """Where the `count` largest are, bool; of equals the first."""
    return torch.zeros_like(x, dtype=torch.bool).scatter(0, x.argsort(descending=True, stable=True)[:count], True)


def slerp(x: Tensor, y: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Spherical interpolation of unit vectors x and y [n, d]. `docs/theory.md 8.5`.

    Where sin Ω vanishes it is the direction of the mean. Between opposite vectors there is no one way: it is y.

    Returns:
        The unit vectors at `share` of the way from x to y, [n, d], and the angles Ω between x and y, [n].
    """
    angle = (x * y).sum(1).clamp(-1, 1).acos()
    sine = angle.sin()
    usable = sine > 1e-4
    a = torch.where(usable, ((1 - share) * angle).sin() / sine, 1 - share)
    b = torch.where(usable, (share * angle).sin() / sine, share)
    mixed = a[:, None] * x + b[:, None] * y
    length = vector_norm(mixed, dim=1, keepdim=True)
    return torch.where(length > 1e-3, mixed / length.clamp(min=1e-3), x), angle
