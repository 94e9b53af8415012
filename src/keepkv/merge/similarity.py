"""Sets: entries merged with others into one slot, by the similarity of their keys.

Functions map (keys [T, d], values [T, d_v], kept [n]) and what else they need to a `Merged`, as in merge.py. A slot that
nothing was merged into keeps its key, value and vote bit for bit. bias [T], where given, is the log of the votes that the
entries have already, from earlier merges: so merges compose. verbatim, bool [T]: entries that nothing may be merged into.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from keepkv.merge.merged import Merged
from keepkv.types import Choice


def similarity(keys: Tensor, kept: Tensor, verbatim: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For every entry its greatest cosine with a kept key, and the index into `kept` of that key; -inf, 0 if there is none."""
    direction = normalize(keys, dim=-1)
    closeness = direction @ direction[kept].T
    if verbatim is not None:
        closeness.masked_fill_(verbatim[kept], -torch.inf)
    best, target = closeness.max(-1)
    return best, target


def nearest_kept(keys: Tensor, kept: Tensor, threshold: float, verbatim: Tensor | None = None) -> Tensor:
    """For every entry the index into `kept` it merges into, int64 [T]: its own, or the most similar kept key's.

    -1 where the best cosine is not above the threshold: dropped. KeepKV, Algorithm 1.
    """
    best, target = similarity(keys, kept, verbatim)
    target = target.masked_fill(best <= threshold, -1)
    target[kept] = torch.arange(len(kept), device=keys.device)
    return target


class Groups:
    """The entries grouped by the slot they go to, target [T] as in `Choice`. Sums are deterministic.

    member [m]: the entries that go anywhere, slot by slot; slot [m]: where to; size [n]: how many a slot takes over.
    """

    def __init__(self, kept: Tensor, target: Tensor) -> None:
        member = (target >= 0).nonzero().flatten()
        self.kept, self.member = kept, member[target[member].argsort(stable=True)]
        self.slot = target[self.member]
        self.size = torch.bincount(self.slot, minlength=len(kept))

    def sum(self, x: Tensor) -> Tensor:
        """Of x [m] or [m, k] over each slot's members."""
        return self._reduce(x, "sum")

    def max(self, x: Tensor) -> Tensor:
        return self._reduce(x, "max")

    def mean(self, x: Tensor, weights: Tensor) -> Tensor:
        """sum of weights [m] times x [T, k] over each slot's members, [n, k]."""
        return self.sum(weights[:, None] * x[self.member])

    def shares(self, weights: Tensor) -> Tensor:
        """weights [m] divided by the sum over their slot's members."""
        return weights / self.sum(weights)[self.slot]

    def result(
        self, before: tuple[Tensor, Tensor, Tensor], keys: Tensor, values: Tensor, bias: Tensor, fallbacks: int = 0
    ) -> Merged:
        """The merged keys, values and bias; what stays alone is as before: keys [T, d], values, bias."""
        alone = self.size == 1
        old_keys, old_values, old_bias = (x[self.kept] for x in before)
        return Merged(
            torch.where(alone[:, None], old_keys, keys),
            torch.where(alone[:, None], old_values, values),
            torch.where(alone, old_bias, bias),
            fallbacks,
        )

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        flat = x.reshape(len(x), -1).contiguous()
        reduced: Tensor = torch.segment_reduce(flat, how, lengths=self.size)
        return reduced.reshape(-1, *x.shape[1:])


def _grouped(choice: Choice, bias: Tensor | None, keys: Tensor) -> tuple[Groups, Tensor, Tensor]:
    """The groups, the bias of all entries, and the members' votes."""
    assert choice.target is not None, "the method's choice says what is merged into what"
    groups = Groups(choice.kept, choice.target)
    bias = torch.zeros(len(keys), device=keys.device) if bias is None else bias
    return groups, bias, bias[groups.member].exp()
