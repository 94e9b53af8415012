"""Validation: the newest quarter of a text stands in for what comes next, to judge what the slots of the older text lose.

The queries that a fit is made for are the text's own, asked again from behind it. Those that come really are asked once, see
newer tokens beside the slots, and ask for what has been said before. The newest quarter shows how much they do:
`docs/theory.md 5.3`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.merge.merged import Merged
from keepkv.ops.softmax import Softmax, log_total
from keepkv.types import Observation

NEWEST = 4  # one of so many parts of the text is taken for what comes next
ROWS = 128  # positions of that part, evenly spread, whose queries are asked
LEAST = 16  # fewer of them judge nothing


class Validation(NamedTuple):
    """Real queries of the newest quarter of a text, and what they got of the older tokens and of the newer ones.

    Attributes:
        first: The first position of the newest quarter. Slots of older positions are judged; newer tokens are seen exactly.
        queries: [H, G × R, d], scaled, position by position within a query head.
        log_z: [H, G × R], ln Z_q over all entries that a query sees.
        outputs: Y, the exact outputs [H, G × R, d_v].
        rest: [H, G × R], the share of all but older entries: of the newest quarter, and of a sink.
        newest_outputs: [H, G × R, d_v], what it gave of Y.
        projection: [H, G, d_v, D], see `Observation.projection`; or None.
        repeat_share: [H, T], see `References.repeat_share`.
        softmax: The layer's cap.
        energy: The mean square of the layer's output; without a projection, H times that of each head's own, [H].
    """

    first: int
    queries: Tensor
    log_z: Tensor
    outputs: Tensor
    rest: Tensor
    newest_outputs: Tensor
    projection: Tensor | None
    repeat_share: Tensor
    softmax: Softmax
    energy: Tensor

    @staticmethod
    def of(observation: Observation) -> Validation | None:
        """The validation rows of a layer, with its references; None where the newest quarter has asked too little."""
        references = observation.references
        assert references is not None, "the method table names references"
        first = observation.tokens - observation.entries // NEWEST  # of a fold: of slots and newer tokens, most of these
        asked = (observation.query_positions >= first).nonzero()[:, 0]
        if len(asked) < LEAST:
            return None
        asked = asked[torch.linspace(0, len(asked) - 1, min(ROWS, len(asked)), device=asked.device).long()]
        queries = (observation.queries[:, :, asked].float() * observation.scale).flatten(1, 2)
        at = observation.query_positions[asked].repeat(observation.queries.shape[1])
        sinks = observation.softmax.of_rows(observation.heads, queries.shape[1])
        log_z, outputs, masses, newest = [], [], [], []
        for head in range(observation.heads):  # one at a time: the shares of a head are the largest matrix here
            logits = observation.softmax.capped(queries[head] @ observation.keys[head].float().T)
            if observation.bias is not None:
                logits += observation.bias[head]
            positions = observation.positions[head]
            logits = logits.masked_fill_(positions > at[:, None], -torch.inf)
            z = log_total(logits, None if sinks is None else sinks[head])
            z = z.masked_fill(z.isneginf(), 0)  # of a row that sees nothing
            share = logits.sub_(z[:, None]).exp_()
            values = observation.values[head].float()
            newer = positions >= first
            log_z.append(z)
            outputs.append(share @ values)
            sunk = 0.0 if sinks is None else (sinks[head].to(z.dtype) - z).exp()
            masses.append(share[:, newer].sum(1) + sunk)
            newest.append(share[:, newer] @ values[newer])
        exact = torch.stack(outputs)
        rows = Validation(
            first,
            queries,
            torch.stack(log_z),
            exact,
            torch.stack(masses),
            torch.stack(newest),
            observation.projection,
            references.repeat_share,
            observation.softmax,
            torch.ones(observation.heads, device=exact.device),
        )
        if rows.projection is None:
            return rows._replace(energy=observation.heads * exact.square().sum(2).mean(1))
        layer = sum(rows._projected(head, exact[head]) for head in range(observation.heads))
        assert isinstance(layer, Tensor)
        return rows._replace(energy=layer.square().sum(1).mean().expand(observation.heads))

    def _projected(self, head: int, outputs: Tensor) -> Tensor:
        """What outputs [G × R, d_v] of a head's query heads add to the layer's, [R, D]."""
        assert self.projection is not None
        weight = self.projection[head].to(outputs.device, torch.float32)
        return torch.einsum("grv,gvd->rd", outputs.view(len(weight), -1, outputs.shape[1]), weight)

    def _size(self, head: int, outputs: Tensor) -> Tensor:
        """The mean square of outputs [G × R, d_v] of a head, as a share of the layer's."""
        seen = outputs if self.projection is None else self._projected(head, outputs)
        return seen.square().sum(1).mean() / self.energy[head].clamp(min=1e-30)

    def lost(self, kept: Sequence[Tensor], merged: Sequence[Merged], positions: Tensor) -> list[float]:
        """What every head loses with these slots for older tokens, a share of the mean square of its layer's output, at most 1.

        It is the mean square of W_O (Y' - Y), Y' the output over the slots of older tokens and the newest quarter, and of what
        the repetition asks in vain the same share of the head's own part (`docs/theory.md 5.3`).

        Args:
            kept: The entries of each head's slots, int64 [n].
            merged: Each head's slots.
            positions: [H, T], of the entries.
        """
        losses = []
        for head, (entries, slots) in enumerate(zip(kept, merged, strict=True)):
            older = positions[head, entries] < self.first
            logits = self.softmax.capped(self.queries[head] @ slots.keys[older].float().T)
            share = (logits + slots.bias[older] - self.log_z[head][:, None]).clamp_(max=20).exp_()
            mass = share.sum(1) + self.rest[head]
            outputs = (share @ slots.values[older].float() + self.newest_outputs[head]) / mass.clamp(min=1e-30)[:, None]
            asked = self.repeat_share[head].square()
            in_vain = (asked.sum() - asked[entries].sum()).clamp(min=0)
            losses.append(self._size(head, outputs - self.outputs[head]) + in_vain * self._size(head, self.outputs[head]))
        read: list[float] = torch.stack(losses).nan_to_num(nan=1).clamp_(max=1).tolist()  # from the device at once
        return read
