"""Similarity: entries merged with others into one slot, by how alike their keys are. What the rules of several papers share.

A rule maps keys [T, d], values [T, d_v], what is kept, and what else it needs to a `Merged`. A slot that nothing was merged
into keeps its key, value and vote bit for bit. bias [T], where given, is the logarithm of the votes that the entries have from
earlier merges, so that merges compose (`docs/theory.md 1.4`). verbatim, bool [T], are entries that nothing may be merged into.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from keepkv.merge.merged import Merged
from keepkv.types import Choice


def similarity(keys: Tensor, kept: Tensor, verbatim: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For every entry its greatest cosine with a kept key, and the index into `kept` of that key; -inf, 0 if there is none.

    Args:
        keys: [T, d].
        kept: int64 [n], the entries that keep a slot.
        verbatim: bool [T], entries that nothing may be merged into; or None.

    Returns:
        [T], and int64 [T].
    """
    direction = normalize(keys, dim=-1)
    closeness = direction @ direction[kept].T
    if verbatim is not None:
        closeness.masked_fill_(verbatim[kept], -torch.inf)
    best, target = closeness.max(-1)
    return best, target


def nearest_kept(keys: Tensor, kept: Tensor, threshold: float, verbatim: Tensor | None = None) -> Tensor:
    """For every entry the slot that it merges into: its own, or that of the most similar kept key.

    Args:
        keys: [T, d].
        kept: int64 [n], the entries that keep a slot.
        threshold: A cosine. Entries whose best one is not above it are dropped.
        verbatim: bool [T], entries that nothing may be merged into; or None.

    Returns:
        int64 [T], indices into `kept`; -1 for what is dropped. KeepKV, arXiv 2504.09936, algorithm 1; `docs/theory.md 2.3`.
    """
    best, target = similarity(keys, kept, verbatim)
    target = target.masked_fill(best <= threshold, -1)
    target[kept] = torch.arange(len(kept), device=keys.device)
    return target


class Groups:
    """The entries grouped by the slot that they go to. Sums over a group are deterministic.

    `member` [m] are the entries that go anywhere, slot by slot, `slot` [m] is where they go to, and `size` [n] how many each
    slot takes over.

    Args:
        kept: int64 [n], the entries that keep a slot.
        target: int64 [T], as in `Choice`.
    """

    def __init__(self, kept: Tensor, target: Tensor) -> None:
        member = (target >= 0).nonzero().flatten()
        self.kept = kept
        self.member = member[target[member].argsort(stable=True)]
        self.slot = target[self.member]
        self.size = torch.bincount(self.slot, minlength=len(kept))

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x, [m] or [m, k], over each slot's members."""
        return self._reduce(x, "sum")

    def max(self, x: Tensor) -> Tensor:
        """The largest x [m] of each slot's members."""
        return self._reduce(x, "max")

    def mean(self, x: Tensor, weights: Tensor) -> Tensor:
        """The sum of weights [m] times x [T, k] over each slot's members, [n, k]."""
        return self.sum(weights[:, None] * x[self.member])

    def shares(self, weights: Tensor) -> Tensor:
        """weights [m] divided by the sum over their slot's members."""
        return weights / self.sum(weights)[self.slot]

    def result(
        self, before: tuple[Tensor, Tensor, Tensor], keys: Tensor, values: Tensor, bias: Tensor, fallbacks: int = 0
    ) -> Merged:
        """The merged keys, values and bias. A slot of one member is as before: keys [T, d], values, bias of all entries."""
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


def grouped(choice: Choice, bias: Tensor | None, keys: Tensor) -> tuple[Groups, Tensor, Tensor]:
    """The groups of a choice that names targets, the bias of all entries [T], and the members' votes [m]."""
    assert choice.target is not None, "the method's choice says what is merged into what"
    groups = Groups(choice.kept, choice.target)
    bias = torch.zeros(len(keys), device=keys.device) if bias is None else bias
    return groups, bias, bias[groups.member].exp()
