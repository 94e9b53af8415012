"""The three frozen values that travel: Observation -> Plan -> Slots.

Shapes use: L layers, H KV heads, G query heads per KV head, T tokens, N observed queries, d and d_v head sizes.
Every value describes one sequence (no batch, no padding) except `Slots`, which holds a batch flat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.ops.ragged import Ragged


@dataclass(frozen=True)
class References:
    """Reference queries of one layer and the exact attention they get over all T entries; everything float32.

    queries [H, R, d], R rows, scaled, so that logits are queries @ keys.T; visible [R] int64: each row sees the entries of
    smaller positions; log_z [H, R], the log of the softmax denominator; outputs [H, R, d_v]; rms_share [H, T], the
    root mean square of each entry's softmax share, over these rows and more; repeat_share [H, T], the same for queries
    that ask for one token each, word for word, and are not among the rows: 0 where the text was not repeated.
    """

    queries: Tensor
    visible: Tensor
    log_z: Tensor
    outputs: Tensor
    rms_share: Tensor
    repeat_share: Tensor


class ReferenceRows(NamedTuple):
    """Reference rows of one head, or of several, [h, ...]: queries [R, d], log_z [R], outputs [R, d_v], visible [R], the same
    for all; and the entries they are asked of: keys [T, d] float32, bias [T] or None, positions [T], repeat_share [T], as in
    `Observation` and `References`.
    """

    queries: Tensor
    visible: Tensor
    log_z: Tensor
    outputs: Tensor
    keys: Tensor
    bias: Tensor | None
    positions: Tensor
    repeat_share: Tensor

    def take(self, which: Tensor) -> ReferenceRows:
        """The rows int64 [m] of R."""
        return self._replace(
            queries=self.queries.index_select(-2, which), visible=self.visible[which],
            log_z=self.log_z.index_select(-1, which), outputs=self.outputs.index_select(-2, which),
        )  # fmt: skip

    def share(self, entries: Tensor) -> Tensor:
        """The exact softmax share that every row gives to the entries [n], of several heads [h, n], votes counted: [R, n]."""
        logits = self.queries @ self.keys.take_along_dim(entries[..., None], -2).mT
        if self.bias is not None:
            logits += self.bias.gather(-1, entries)[..., None, :]
        share = logits.sub_(self.log_z[..., None]).exp_()
        return share.masked_fill_(self.positions.gather(-1, entries)[..., None, :] >= self.visible[:, None], 0)

    def on(self, slots: Ragged) -> Tensor:
        """`share` of several heads' entries, [h, R, n]; 0 where there is none."""
        share = self.share(slots.entries)
        return share if len(share) == 1 else share.masked_fill_(~slots.real[:, None], 0)


@dataclass(frozen=True)
class Observation:
    """What one layer showed while it read one sequence: T entries, each a token, or a slot of an earlier compression.

    keys [H, T, d] as stored (after RoPE); values [H, T, d_v]; queries [H, G, N, d] as they were asked (after RoPE),
    the newest last; query_positions [N] int64, ascending, the token index that asked; inv_freq [r/2] float32, the
    rotary frequencies (r <= d rotated dimensions, rotate-half layout); scale, the factor on q·k;
    column_mass [H, T] float32 or None, the attention each entry received from all queries (mean over the group);
    repeat_peak [H, T] float32 or None, the largest share each entry got while the text was repeated over its own cache;
    repeated [H, G, M, d] or None, queries of that repetition as they were asked, after all T entries;
    projection [H, G, d_v, D] or None, the part of the layer's output projection that each query head's output goes through;
    keep [H, T] bool or None, entries that must stay verbatim whatever the method; references, the queries that a compression
    must serve, for methods that fit; seed and layer make chance repeatable.
    Where entries are slots: bias [H, T] float32, the log of their votes, -inf for the first ones of a head that has fewer
    entries than another; places [H, T] int64, ascending, the token each key comes from; read, how many tokens were read.
    All three are None where every entry is one token.
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
    repeat_peak: Tensor | None = None
    repeated: Tensor | None = None
    projection: Tensor | None = None
    keep: Tensor | None = None
    references: References | None = None
    bias: Tensor | None = None
    places: Tensor | None = None
    read: int | None = None

    @property
    def entries(self) -> int:
        """T, with those that only fill up."""
        return self.keys.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens read: the next one's position."""
        return self.entries if self.read is None else self.read

    @property
    def positions(self) -> Tensor:
        """The token each entry's key comes from, int64 [H, T]."""
        if self.places is not None:
            return self.places
        return torch.arange(self.entries, device=self.keys.device).expand(self.heads, -1)

    @property
    def counts(self) -> list[int]:
        """How many entries each head really has."""
        return [self.entries] * self.heads if self.bias is None else self.present.sum(1).tolist()

    @property
    def present(self) -> Tensor:
        """Which entries are real, bool [H, T]."""
        if self.bias is None:
            return torch.ones(self.keys.shape[:2], dtype=torch.bool, device=self.keys.device)
        return self.bias > -torch.inf

    def head_bias(self, head: int | slice) -> Tensor | None:
        return None if self.bias is None else self.bias[head]

    def head_keep(self, head: int | slice) -> Tensor | None:
        return None if self.keep is None else self.keep[head]

    def rows(self, head: int | slice) -> ReferenceRows:
        """The reference rows of a head, or of several. The method must name references."""
        ref = self.references
        assert ref is not None, "the method table names references"
        return ReferenceRows(
            ref.queries[head], ref.visible, ref.log_z[head], ref.outputs[head],
            self.keys[head].float(), self.head_bias(head), self.positions[head], ref.repeat_share[head],
        )  # fmt: skip

    @property
    def reference_rows(self) -> int:
        """R."""
        return 0 if self.references is None else len(self.references.visible)

    @property
    def heads(self) -> int:
        return self.keys.shape[0]

    @property
    def generator(self) -> torch.Generator:
        """A fresh CPU generator for this layer: the same numbers whenever and however often it is asked for."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.layer)


class Choice(NamedTuple):
    """What becomes of one head's entries: kept int64 [n], ascending, keep a slot; target int64 [T], the slot (an index into
    kept) that each entry is merged into, -1 for what is dropped; None where the merge decides that."""

    kept: Tensor
    target: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """Which entries keep a slot: kept[layer][head] is int64 [n], ascending indices of entries (tokens, the first time)."""

    kept: tuple[tuple[Tensor, ...], ...]

    @property
    def total_slots(self) -> int:
        """Slots over all layers and heads."""
        return sum(len(head) for layer in self.kept for head in layer)
