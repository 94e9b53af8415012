"""The frozen values that travel: an Observation becomes Choices and a Plan, and these become Slots.

Shapes use: L layers, H KV heads, G query heads per KV head, T entries, N observed queries, d and d_v head sizes. Every value
describes one sequence (no batch, no padding) except `Slots`, which holds a batch flat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.ops.ragged import Ragged
from keepkv.ops.rope import Rotation
from keepkv.ops.softmax import PLAIN, Softmax
from keepkv.slots.slot_dtype import FLOAT, SlotDtype


@dataclass(frozen=True)
class References:
    """Reference queries of one layer, and the exact attention they get over all T entries. `docs/theory.md 4.1`.

    Args:
        queries: [H, R, d] float32, already scaled: logits are queries @ keys.T. A reference query is called a row.
        visible: [R] int64; each row sees the entries of smaller positions.
        log_z: [H, R] float32, the logarithm of the softmax denominator.
        outputs: [H, R, d_v] float32, the exact outputs.
        rms_share: [H, T] float32, the root mean square of each entry's softmax share over these rows, and possibly more.
        repeat_share: [H, T] float32, the same for the queries of a repetition of the text, which are modeled and not among
            the rows: each asks for one token alone. 0 where the text was not repeated. `docs/theory.md 4.4`.
        sink_share: [H, R] float32, the share that a sink has of each row; None for a layer without sinks. All the entries
            together have the rest.
    """

    queries: Tensor
    visible: Tensor
    log_z: Tensor
    outputs: Tensor
    rms_share: Tensor
    repeat_share: Tensor
    sink_share: Tensor | None = None


class ReferenceRows(NamedTuple):
    """The reference rows of one head, or of h heads, with the entries they are asked of. All tensors may begin with [h].

    Attributes:
        queries: [R, d], as in `References`.
        visible: [R] int64, the same for all heads.
        log_z: [R].
        outputs: [R, d_v].
        keys: [T, d] float32, of the entries.
        bias: [T] or None, as in `Observation`.
        positions: [T] int64, as in `Observation`.
        repeat_share: [T], as in `References`.
        stored_as: How the slots will be stored, no tensor.
        softmax: The layer's cap, no tensor.
        sink_share: [R] or None, as in `References`.
    """

    queries: Tensor
    visible: Tensor
    log_z: Tensor
    outputs: Tensor
    keys: Tensor
    bias: Tensor | None
    positions: Tensor
    repeat_share: Tensor
    stored_as: SlotDtype = FLOAT
    softmax: Softmax = PLAIN
    sink_share: Tensor | None = None

    @property
    def sunk(self) -> Tensor | float:
        """The share of every row that its sink has, [R]; 0 without sinks."""
        return 0.0 if self.sink_share is None else self.sink_share

    def take(self, which: Tensor) -> ReferenceRows:
        """Only the rows `which`, int64 [m]."""
        return self._replace(
            queries=self.queries.index_select(-2, which),
            visible=self.visible[which],
            log_z=self.log_z.index_select(-1, which),
            outputs=self.outputs.index_select(-2, which),
            sink_share=None if self.sink_share is None else self.sink_share.index_select(-1, which),
        )

    def share(self, entries: Tensor) -> Tensor:
        """The exact softmax share A_qj = exp(q·k_j + b_j - ln Z_q) that every row gives to some entries.

        It is 0 where the row does not see the entry, and at most 1, but for keys that were rounded: of these e^20 at most, so
        that sums of squares stay finite. `docs/theory.md 6.1`.

        Args:
            entries: Indices, int64 [n], or [h, n] for several heads.

        Returns:
            [R, n], or [h, R, n].
        """
        logits = self.softmax.capped(self.queries @ self.keys.take_along_dim(entries[..., None], -2).mT)
        if self.bias is not None:
            logits += self.bias.gather(-1, entries)[..., None, :]
        share = logits.sub_(self.log_z[..., None]).clamp_(max=20).exp_()
        return share.masked_fill_(self.positions.gather(-1, entries)[..., None, :] >= self.visible[:, None], 0)

    def on(self, slots: Ragged) -> Tensor:
        """`share` of several heads' entries, [h, R, n]; 0 where a head has fewer."""
        share = self.share(slots.entries)
        return share if len(share) == 1 else share.masked_fill_(~slots.real[:, None], 0)


@dataclass(frozen=True)
class Observation:
    """What one layer showed while it read one sequence. Each of the T entries is a token, or a slot of an earlier compression.

    Args:
        keys: [H, T, d], as stored (after RoPE).
        values: [H, T, d_v].
        queries: [H, G, N, d], as they were asked (after RoPE), the newest last.
        query_positions: [N] int64, ascending, the token that asked each query.
        rotation: How the layer's keys and queries turn with their position.
        scale: The factor on q·k.
        layer: The layer's index; with `seed` it makes chance repeatable.
        seed: Of all that is drawn by chance.
        column_mass: [H, T] float32, the attention each entry received from all queries, mean over the group; or None.
        repeat_peak: [H, T] float32, the largest share each entry got while the text was repeated over its own cache; or None.
        repeated: [H, G, M, d], queries of that repetition as they were asked, after all T entries; or None.
        projection: [H, G, d_v, D], the part of the output projection that each query head's output goes through; or None.
        keep: [H, T] bool, entries that must stay verbatim whatever the method; or None.
        references: The queries that a compression must serve, for methods that name some.
        bias: [H, T] float32, the logarithm of each slot's vote. A head with fewer entries than another is filled up in front,
            with a bias of -inf. None where every entry is one token, as are the next two.
        key_positions: [H, T] int64, ascending, the token each key comes from. Use `positions`, which is never None.
        read: How many tokens were read. Use `tokens`, which is never None.
        stored_as: How the slots will be stored. Before a merge, the kept keys are rounded to what will be read.
        slots: Slots per head on average that the compression will leave, for scores; None where that is not decided yet.
        softmax: The layer's cap and sinks.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    query_positions: Tensor
    rotation: Rotation
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
    key_positions: Tensor | None = None
    read: int | None = None
    stored_as: SlotDtype = FLOAT
    slots: float | None = None
    softmax: Softmax = PLAIN

    @property
    def heads(self) -> int:
        """H."""
        return self.keys.shape[0]

    @property
    def entries(self) -> int:
        """T, those that only fill up a shorter head included."""
        return self.keys.shape[1]

    @property
    def tokens(self) -> int:
        """How many tokens were read, which is the position of the next one."""
        return self.entries if self.read is None else self.read

    @property
    def positions(self) -> Tensor:
        """The token each entry's key comes from, int64 [H, T]: `key_positions`, or 0 to T - 1 where entries are tokens."""
        if self.key_positions is not None:
            return self.key_positions
        return torch.arange(self.entries, device=self.keys.device).expand(self.heads, -1)

    @property
    def counts(self) -> list[int]:
        """How many entries each head really has."""
        return [self.entries] * self.heads if self.bias is None else self.present.sum(1).tolist()

    @property
    def present(self) -> Tensor:
        """Which entries are real and do not only fill up, bool [H, T]."""
        if self.bias is None:
            return torch.ones(self.keys.shape[:2], dtype=torch.bool, device=self.keys.device)
        return self.bias > -torch.inf

    @property
    def reference_rows(self) -> int:
        """R, how many reference rows there are."""
        return 0 if self.references is None else len(self.references.visible)

    @property
    def generator(self) -> torch.Generator:
        """A fresh CPU generator for this layer: the same numbers whenever and however often it is asked for."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.layer)

    def head_bias(self, head: int | slice) -> Tensor | None:
        """`bias` of a head, or of several."""
        return None if self.bias is None else self.bias[head]

    def head_keep(self, head: int | slice) -> Tensor | None:
        """`keep` of a head, or of several."""
        return None if self.keep is None else self.keep[head]

    def rows(self, head: int | slice) -> ReferenceRows:
        """The reference rows of a head, or of several. The method must name references."""
        references = self.references
        assert references is not None, "the method table names references"
        return ReferenceRows(
            queries=references.queries[head],
            visible=references.visible,
            log_z=references.log_z[head],
            outputs=references.outputs[head],
            keys=self.keys[head].float(),
            bias=self.head_bias(head),
            positions=self.positions[head],
            repeat_share=references.repeat_share[head],
            stored_as=self.stored_as,
            softmax=self.softmax,
            sink_share=None if references.sink_share is None else references.sink_share[head],
        )


class Choice(NamedTuple):
    """What becomes of one head's entries.

    Attributes:
        kept: int64 [n], ascending, the entries that keep a slot.
        target: int64 [T], the slot (an index into `kept`) that each entry is merged into, -1 for what is dropped. None where
            the merge decides that.
    """

    kept: Tensor
    target: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """Which entries keep a slot: `kept[layer][head]` is int64 [n], ascending indices of entries (tokens, the first time)."""

    kept: tuple[tuple[Tensor, ...], ...]

    @property
    def total_slots(self) -> int:
        """Slots over all layers and heads."""
        return sum(len(head) for layer in self.kept for head in layer)


class CopyingHead(NamedTuple):
    """A KV head, and how much it copies.

    Attributes:
        layer: Counted among the layers with full attention, from 0, as `KeepCache.keep_layers` are.
        head: The KV head.
        share: The attention that its best query head pays to the token after the same token's earlier place, a mean over the
            second half of a random sequence that stands there twice; from 0 to 1.
        query: That query head, counted within its group.
    """

    layer: int
    head: int
    share: float
    query: int = 0
