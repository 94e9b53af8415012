"""Repetition: what a model asks for while it repeats the text, piece by piece. `docs/theory.md 4.4`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.ops.softmax import PLAIN, Softmax
from keepkv.slots.slots import Slots

SINKS = 4  # the first tokens that every piece's shares are counted with, where they are counted alone


class Repeat(NamedTuple):
    """How a method has the text repeated.

    Attributes:
        chunk: So many tokens are repeated at a time. Such a piece sees itself exactly.
        draft: And it sees one in `draft` tokens of the rest of the text; 1: all of it.
        alone: Whether shares are counted among the first 4 tokens, the piece and its repetition only, as KVzip counts them.
            Otherwise they are counted among all.
        queries: Whether the queries of the repetition are kept, for references.
        needed: Whether the method cannot do without the repetition.
        group_mean: Whether a token's share is the mean over the group of each query head's largest one, as KVCompose counts.
            Otherwise it is the largest one of all.
    """

    chunk: int = 256
    draft: int = 16
    alone: bool = False
    queries: bool = False
    needed: bool = False
    group_mean: bool = False


TOGETHER = Repeat()  # the default: each piece over a draft of the rest
WHOLE = Repeat(chunk=2048, draft=1, alone=True, queries=True, needed=True)  # as in KVzip: every piece over the full cache


class Piece(NamedTuple):
    """The part of the text that is being repeated.

    Attributes:
        first: Its first token.
        last: The token behind its last one.
        drafts: A draft of the whole text: one Slots for each layer.
        how: How the method has the text repeated.
    """

    first: int
    last: int
    drafts: tuple[Slots, ...]
    how: Repeat


def attend_piece(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    new: int,
    draft: Slots,
    first: int,
    last: int,
    offset: int = 0,
    how: Repeat = TOGETHER,
    softmax: Softmax = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Attention of a piece that is being repeated, and what it asks of every token.

    A query sees tokens first to last - 1 exactly, the rest of the text as it is in the draft, and the repetition itself
    causally. So the cost does not depend on the length of the text.

    Args:
        queries: [H, R, d], scaled; R is G × new.
        keys: [H, n + new, d], the tail of the cache, and the repetition.
        values: [H, n + new, d_v].
        new: Tokens of the repetition.
        draft: One layer's draft.
        first: The piece's first token.
        last: The token behind its last one.
        offset: The position of the tail's first token.
        how: How shares are counted (`Repeat.alone`, `Repeat.group_mean`).
        softmax: The layer's cap and sinks.

    Returns:
        The output [H, R, d_v], and the largest share that each token of the tail got [H, n], 0 outside the piece.
    """
    heads = len(keys)
    tail = keys.shape[1] - new
    size = last - first
    output = queries.new_empty(*queries.shape[:2], values.shape[2])
    peak = queries.new_zeros(heads, tail)
    # The columns of the logits are: the piece, the repetition, and what the draft has outside the piece.
    near = torch.arange(first - offset, last - offset, device=keys.device)
    near = torch.cat([near, torch.arange(tail, tail + new, device=keys.device)])
    sinks = softmax.of_rows(heads, queries.shape[1])
    hidden = torch.ones(new, new, dtype=torch.bool, device=keys.device).triu(1).repeat(queries.shape[1] // new, 1)
    for head, (lo, hi) in enumerate(zip(draft.offsets, draft.offsets[1:], strict=False)):
        far = lo + ((draft.positions[lo:hi] < first) | (draft.positions[lo:hi] >= last)).nonzero()[:, 0]
        share = softmax.capped(queries[head] @ torch.cat([keys[head, near], draft.keys[far].to(keys.dtype)]).T)
        share[:, size : len(near)].masked_fill_(hidden, -torch.inf)
        share[:, len(near) :] += draft.bias[far]
        # A softmax in place: the logits of a piece are the largest matrix here.
        top = share.amax(1, keepdim=True)
        total = share.sub_(top).exp_().sum(1, keepdim=True)
        if sinks is not None:
            total += (sinks[head, :, None].to(top.dtype) - top).exp_()
        share.mul_(total.reciprocal_())
        output[head] = share @ torch.cat([values[head, near], draft.values[far].to(values.dtype)])
        if how.alone:  # the output is that over all; only the shares are counted anew, as those among fewer entries
            counted = torch.cat([torch.ones_like(near, dtype=torch.bool), draft.positions[far] < SINKS])
            share.mul_(share[:, counted].sum(1, keepdim=True).clamp_(min=1e-30).reciprocal_())
        own_peak = share[:, :size].reshape(-1, new, size).amax(1)  # [G, size]
        peak[head, first - offset : last - offset] = own_peak.mean(0) if how.group_mean else own_peak.amax(0)
    return output, peak
