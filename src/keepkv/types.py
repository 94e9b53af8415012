"""The three frozen values that travel: Observation -> Plan -> Slots.

Shapes use: L layers, H KV heads, G query heads per KV head, T tokens, N observed queries, d and d_v head sizes.
Every value describes one sequence (no batch, no padding) except `Slots`, which holds a batch flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """Reference queries of one layer and the exact attention they get over all T tokens; everything float32.

    queries [H, R, d], R rows, scaled, so that logits are queries @ keys.T; visible [R] int64, how many of the tokens, from
    the first, each row sees; log_z [H, R], the log of the softmax denominator; outputs [H, R, d_v]; rms_share [H, T], the
    root mean square of each token's softmax share, over these rows and more; recall [H, T], the same for queries
    that ask for one token each, word for word, and are not among the rows: 0 where the text was not repeated.
    """

    queries: Tensor
    visible: Tensor
    log_z: Tensor
    outputs: Tensor
    rms_share: Tensor
    recall: Tensor

    def rows(self, head: int) -> Rows:
        """One head's rows."""
        return Rows(self.queries[head], self.visible, self.log_z[head], self.outputs[head], self.recall[head])


class Rows(NamedTuple):
    """Reference rows of one head: queries [R, d], visible [R], log_z [R], outputs [R, d_v]; recall [T]."""

    queries: Tensor
    visible: Tensor
    log_z: Tensor
    outputs: Tensor
    recall: Tensor

    def take(self, which: Tensor) -> Rows:
        """The rows for which bool [R] is true."""
        return Rows(self.queries[which], self.visible[which], self.log_z[which], self.outputs[which], self.recall)

    def share(self, keys: Tensor, tokens: Tensor) -> Tensor:
        """The exact softmax share that every row gives to the tokens, [R, n]. keys [T, d] of all tokens, float32."""
        share = (self.queries @ keys[tokens].T).sub_(self.log_z[:, None]).exp_()
        return share.masked_fill_(tokens >= self.visible[:, None], 0)


@dataclass(frozen=True)
class Observation:
    """What one layer showed while it read one sequence.

    keys [H, T, d] as stored (after RoPE); values [H, T, d_v]; queries [H, G, N, d] as they were asked (after RoPE),
    the newest last; query_positions [N] int64, ascending, the token index that asked; inv_freq [r/2] float32, the
    rotary frequencies (r <= d rotated dimensions, rotate-half layout); scale, the factor on q·k;
    column_mass [H, T] float32 or None, the attention each token received from all queries (mean over the group);
    recall [H, T] float32 or None, the largest share each token got while the text was repeated over its own cache;
    keep [T] bool or None, tokens that must stay verbatim whatever the method; reference, the queries that a compression
    must serve, for methods that fit; seed and layer make chance repeatable.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    query_positions: Tensor
    inv_freq: Tensor
    scale: float
    layer: int = 0
    seed: int = 0
    column_mass: Tensor | None = None
    recall: Tensor | None = None
    keep: Tensor | None = None
    reference: Reference | None = None

    @property
    def tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def heads(self) -> int:
        return self.keys.shape[0]

    @property
    def generator(self) -> torch.Generator:
        """A fresh CPU generator for this layer: the same numbers whenever and however often it is asked for."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.layer)


@dataclass(frozen=True)
class Plan:
    """Which tokens keep their slot: kept[layer][head] is int64 [n], ascending token indices."""

    kept: tuple[tuple[Tensor, ...], ...]

    @property
    def slots(self) -> int:
        """Slots over all layers and heads."""
        return sum(len(head) for layer in self.kept for head in layer)


@dataclass(frozen=True)
class Slots:
    """The compact part of one layer, ragged and flat: row b and KV head h own offsets[b*H+h] : offsets[b*H+h+1].

    keys [total, d] and values [total, d_v] in the model's dtype; bias [total] float32, the log of each slot's vote,
    added to its logit; positions [total] int32, the token each slot's key comes from; offsets, rows*H + 1 integers.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    positions: Tensor
    offsets: tuple[int, ...]

    @property
    def counts(self) -> list[int]:
        """Slots of every (row, KV head), rows outermost."""
        return [hi - lo for lo, hi in zip(self.offsets, self.offsets[1:], strict=False)]

    @property
    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self) if field.name != "offsets"]

    @staticmethod
    def cat(parts: Sequence[Slots]) -> Slots:
        """Stacks heads, or rows, of one layer: the parts stand one after the other."""
        counts = [n for part in parts for n in part.counts]
        stacked = zip(*(part.tensors for part in parts), strict=True)
        keys, values, bias, positions = (torch.cat(tensors) for tensors in stacked)
        return Slots(keys, values, bias, positions, (0, *accumulate(counts)))

    def rows(self, indices: Sequence[int], heads: int) -> Slots:
        """The given batch rows, in that order, copied: what beam search and batch selection need. heads = H."""
        return Slots.cat([self._part(row * heads, (row + 1) * heads) for row in indices])

    def _part(self, first: int, last: int) -> Slots:
        bounds = self.offsets[first : last + 1]
        keys, values, bias, positions = (tensor[bounds[0] : bounds[-1]] for tensor in self.tensors)
        return Slots(keys, values, bias, positions, tuple(bound - bounds[0] for bound in bounds))
