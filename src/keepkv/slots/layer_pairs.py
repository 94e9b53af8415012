"""LayerPairs: two layers store their slots together. MiniCache, arXiv 2405.14366."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.linalg import vector_norm

from keepkv.slots.shared import Block, Shared
from keepkv.slots.slots import Slots


@dataclass(frozen=True)
class LayerPairs:
    """Neighbouring layers, from `start` of the depth on, share their slots' directions, two by two.

    For vectors x, y of the same token in the lower and the upper layer, at an angle Ω:
    e = [sin((1-t) Ω) x/||x|| + sin(t Ω) y/||y||] / sin Ω, t = .6; x is restored as ||x|| e, y as ||y|| e. Keys and values
    each on their own, head by head. The 5% with the largest angles are held as they are. arXiv 2405.14366, section 4.
    """

    start: float = 0.5
    share: float = 0.6
    retain: float = 0.05

    def of(self, layers: int) -> list[tuple[int, int]]:
        """The pairs (lower, upper)."""
        first = max(1, int(self.start * layers))
        return [(upper - 1, upper) for upper in range(first, layers, 2)]

    def cost(self, layers: int, vectors: int, beside: int) -> float:
        """What a slot takes of one that shares nothing, mean over the layers: so many more slots take as much memory.

        vectors: bytes of a key and a value; beside: of what is never shared.
        """
        paired = 2 * len(self.of(layers)) / layers
        return 1 - paired * self._saved(vectors) / (vectors + beside)

    def _saved(self, vectors: int) -> float:
        """Bytes that a slot of a pair saves: half of its vectors but for what is retained, less two norms and two places."""
        return max(0.0, vectors * (1 - self.retain) / 2 - 2 * 8)

    def tie(self, scores: Tensor) -> Tensor:
        """Scores [L, H, T], the two layers of a pair with the mean of both: they must keep the same tokens."""
        tied = scores.clone()
        for lower, upper in self.of(len(scores)):
            tied[lower] = tied[upper] = (scores[lower] + scores[upper]) / 2
        return tied

    def pack(self, parts: Sequence[Slots]) -> list[Slots]:
        """All layers' slots of one sequence, with the directions of each pair stored once, where that saves anything."""
        packed = list(parts)
        for lower, upper in self.of(len(parts)):
            x, y = parts[lower], parts[upper]
            keys, values = (x.keys[:], y.keys[:]), (x.values[:], y.values[:])
            if self._saved(sum(part.shape[1] * part.element_size() for part in (keys[0], values[0]))):
                keys_of, values_of = self._pair(*keys, x.counts), self._pair(*values, x.counts)
                packed[lower] = replace(x, keys=keys_of[0], values=values_of[0])
                packed[upper] = replace(y, keys=keys_of[1], values=values_of[1])
        return packed

    def _pair(self, x: Tensor, y: Tensor, counts: Sequence[int]) -> tuple[Shared, Shared]:
        wide = torch.promote_types(x.dtype, torch.float32)
        norms = [vector_norm(vectors.to(wide), dim=1) for vectors in (x, y)]
        one, other = (v / n.clamp(min=1e-30)[:, None] for v, n in zip((x.to(wide), y.to(wide)), norms, strict=True))
        direction, angle = slerp(one, other, self.share)
        apart = torch.cat([_largest(head, int(self.retain * len(head))) for head in torch.split(angle, list(counts))])
        pool = torch.cat([direction[~apart].to(x.dtype), x[apart], y[apart]])
        kept = int(apart.sum())
        place = torch.empty(len(x), dtype=torch.int32, device=x.device)
        place[~apart] = torch.arange(len(x) - kept, dtype=torch.int32, device=x.device)
        own = torch.arange(len(x) - kept, len(x), dtype=torch.int32, device=x.device)
        lower, upper = (
            Shared((Block(pool, place.masked_scatter(apart, own + which * kept), norm.masked_fill(apart, 1)),))
            for which, norm in enumerate(norms)
        )
        return lower, upper


def _largest(x: Tensor, count: int) -> Tensor:
    """Where the `count` largest are, bool; the first of equals."""
    return torch.zeros_like(x, dtype=torch.bool).scatter(0, x.argsort(descending=True, stable=True)[:count], True)


def slerp(x: Tensor, y: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The unit vector at `share` of the way from x to y [n, d], of length 1, along the sphere, and the angle between them [n].

    Where sin Ω vanishes it is the direction of the mean, for opposite ones, between which there is no one way, y.
    """
    angle = (x * y).sum(1).clamp(-1, 1).acos()
    sine = angle.sin()
    usable = sine > 1e-4
    a = torch.where(usable, ((1 - share) * angle).sin() / sine, 1 - share)
    b = torch.where(usable, (share * angle).sin() / sine, share)
    mixed = a[:, None] * x + b[:, None] * y
    length = vector_norm(mixed, dim=1, keepdim=True)
    return torch.where(length > 1e-3, mixed / length.clamp(min=1e-3), x), angle
