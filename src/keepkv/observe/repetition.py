"""Recall: what a repetition of the text asks for, piece by piece."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.slots.slots import Slots


class Repeat(NamedTuple):
    """How a method has the text repeated: `chunk` tokens at a time, each seeing itself exactly and one in `draft` tokens of
    the rest (1: all of it).

    alone: the shares are those among the first 4 tokens, the piece and its repetition, as KVzip counts them; otherwise
    among all. queries: those of the repetition are kept for references. needed: the method cannot do without.
    """

    chunk: int = 256
    draft: int = 16
    alone: bool = False
    queries: bool = False
    needed: bool = False


WHOLE = Repeat(chunk=2048, draft=1, alone=True, queries=True, needed=True)  # as in KVzip: every piece over the full cache


class Piece(NamedTuple):
    """The part of the text that is being repeated, tokens first..last, and a draft of the whole: one Slots per layer."""

    first: int
    last: int
    drafts: tuple[Slots, ...]
    how: Repeat


SINKS = 4  # tokens that every piece's shares are counted with, where they are counted alone


def attend_piece(
    queries: Tensor, keys: Tensor, values: Tensor, new: int, draft: Slots, first: int, last: int, offset: int = 0,
    alone: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of a repeated piece: output [H, R, d_v], and the largest share that each token of the tail got, [H, n].

    queries [H, R, d], scaled, R a multiple of `new`; keys and values [H, n + new, ...]: the tail, whose first token stands at
    position `offset`, and the repetition itself. A row sees tokens first..last exactly, the rest of the text as in the draft,
    and the repetition causally. So the cost does not depend on how long the text is. alone: see `Repeat`.
    """
    heads, tokens = len(keys), keys.shape[1] - new
    output = queries.new_empty(*queries.shape[:2], values.shape[2])
    peak = queries.new_zeros(heads, tokens)
    near = torch.arange(first - offset, last - offset, device=keys.device)
    near = torch.cat([near, torch.arange(tokens, tokens + new, device=keys.device)])
    hidden = torch.ones(new, new, dtype=torch.bool, device=keys.device).triu(1).repeat(queries.shape[1] // new, 1)
    for head, (lo, hi) in enumerate(zip(draft.offsets, draft.offsets[1:], strict=False)):
        far = lo + ((draft.positions[lo:hi] < first) | (draft.positions[lo:hi] >= last)).nonzero()[:, 0]
        share = queries[head] @ torch.cat([keys[head, near], draft.keys[far].to(keys.dtype)]).T
        share[:, last - first : len(near)].masked_fill_(hidden, -torch.inf)
        share[:, len(near) :] += draft.bias[far]
        share.sub_(share.amax(1, keepdim=True)).exp_()
        share.mul_(share.sum(1, keepdim=True).reciprocal_())
        output[head] = share @ torch.cat([values[head, near], draft.values[far].to(values.dtype)])
        if alone:
            counted = torch.cat([torch.ones_like(near, dtype=torch.bool), draft.positions[far] < SINKS])
            share.mul_(share[:, counted].sum(1, keepdim=True).clamp_(min=1e-30).reciprocal_())
        peak[head, first - offset : last - offset] = share[:, : last - first].amax(0)
    return output, peak
