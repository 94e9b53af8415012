"""Reference queries: what questions the compact cache must answer, and how the full cache answers them."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.attend.dispatch import attend_watched
from keepkv.ops.rope import rotate
from keepkv.types import Observation, References

FUTURE = 512  # context queries are asked again from the next FUTURE positions
ASKED = 3  # of a position's query heads of one group, that many are asked again
ANSWERED = 2  # and of so many the outputs are computed, to fit to
REPEAT_WEIGHT = 1.0  # how often a token is asked for by itself, against one reference row
WINDOW = 64  # the newest queries are also asked from where they stood


def context(observation: Observation) -> References:
    """The context's own queries, asked again from after it, and the newest ones as they were asked (DESIGN section 5).

    Future rows: every query of the bank is rotated from its position p to one drawn from [T, T + 512) and sees all tokens;
    of the G heads of a group two are taken at each position, in turn, and a third that counts for the rms share alone.
    Window rows: the last 64 queries, all heads, where they stood, under the causal mask: what comes next resembles them, so
    that a token's rms share is that over the future rows or that over these, whichever is larger.
    The repetition, if there was one: one token in T is what a query wants, with the largest share it got there:
    share² REPEAT_WEIGHT / T.
    Deterministic in (seed, layer).
    """
    asked, tokens = observation.query_positions, observation.tokens
    group, count = observation.queries.shape[1:3]
    row = torch.arange(count, device=asked.device)
    heads = [(row + turn) % group for turn in range(min(group, ASKED))]
    taken = torch.stack([observation.queries[:, head, row] for head in heads], dim=1).float()
    target = tokens + torch.randint(FUTURE, asked.shape, generator=observation.generator)
    queries = rotate(taken, target.to(asked.device) - asked, observation.inv_freq).flatten(1, 2) * observation.scale
    answered = min(group, ANSWERED) * count
    future = attend_all(queries, observation.keys.float(), observation.values.float(), answered, observation.bias, tokens)
    newest = window(observation, WINDOW)
    repeat_peak = observation.repeat_peak
    return References(
        torch.cat([future.queries, newest.queries], 1),
        torch.cat([future.visible, newest.visible]),
        torch.cat([future.log_z, newest.log_z], 1),
        torch.cat([future.outputs, newest.outputs], 1),
        torch.maximum(future.rms_share, newest.rms_share),
        future.repeat_share if repeat_peak is None else repeat_peak * (REPEAT_WEIGHT / tokens) ** 0.5,
    )


def window(observation: Observation, size: int) -> References:
    """The newest `size` queries of every head as they were asked: position p sees the tokens up to p."""
    logits = window_logits(observation, size).flatten(1, 2)
    queries = observation.queries[:, :, -size:].flatten(1, 2).float() * observation.scale
    visible = (observation.query_positions[-size:] + 1).repeat(observation.queries.shape[1])
    log_z = logits.logsumexp(-1)
    share = logits.sub_(log_z[..., None]).exp_()
    outputs = share @ observation.values.float()
    return References(queries, visible, log_z, outputs, share.square_().mean(1).sqrt_(), torch.zeros_like(share[:, 0]))


def window_logits(observation: Observation, window: int, voted: bool = True) -> Tensor:
    """Causal logits [H, G, w, T] of the last w = min(window, N) queries, float32; -inf where a query cannot see.

    voted: votes count, as in attention; otherwise they are q·k alone.
    """
    queries = observation.queries[:, :, -window:].float()
    logits = (queries * observation.scale) @ observation.keys.float()[:, None].transpose(-1, -2)
    if voted and observation.bias is not None:
        logits += observation.bias[:, None, None]
    asked = observation.query_positions[-window:]
    hidden = (observation.positions[:, None] > asked[:, None]) | ~observation.present[:, None]  # [H, w, T]
    return logits.masked_fill_(hidden[:, None], -torch.inf)


def attend_all(
    queries: Tensor, keys: Tensor, values: Tensor, answered: int | None = None, bias: Tensor | None = None,
    tokens: int | None = None,
) -> References:  # fmt: skip
    """Exact attention of queries [H, R, d] (scaled) over all of keys [H, T, d], values [H, T, d_v], bias [H, T] or None.

    answered: only so many rows, the first, are in the result; the others count in the rms share. tokens: how many were read,
    if the entries are not tokens.
    """
    rows = queries.shape[1] if answered is None else answered
    (outputs, log_z), rms_share = attend_watched(queries, keys, values, bias, rows)
    visible = torch.full((rows,), keys.shape[1] if tokens is None else tokens, device=queries.device)
    return References(queries[:, :rows], visible, log_z, outputs, rms_share, torch.zeros_like(rms_share))
