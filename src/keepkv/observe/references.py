"""Reference queries: what questions the compact cache must answer, and how the full cache answers them."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.attend.dispatch import attend_watched
from keepkv.ops.softmax import PLAIN, Softmax, log_total, shares
from keepkv.types import Observation, References

FUTURE = 512  # context queries are asked again from the next FUTURE positions
ASKED = 3  # of a position's query heads of one group, that many are asked again
ANSWERED = 2  # and of so many the outputs are computed, to fit to
WINDOW = 64  # the newest queries are also asked from where they stood


def context(observation: Observation) -> References:
    """The text's own queries, asked again from behind it, and the newest ones as they were asked. `docs/theory.md 4.2`.

    Future rows: every query of the bank is rotated from its position p to one drawn from [T, T + 512), where it sees all
    entries. Of the G heads of a group, three are asked at each position, in turn. All three count in the rms share; the outputs
    of two are computed, to fit to.

    Window rows: the newest 64 queries, all heads, stay where they stood, under the causal mask. What comes next resembles them.
    An entry's rms share is the larger of that over the future rows and that over the window rows. `docs/theory.md 4.3`.

    The repetition, if there was one: a token is what one query in T wants, with the largest share c that it got then, so that
    its mean square share is c² / T. That counts with the head's mean c², which is how much its queries ask for one token alone.
    `docs/theory.md 4.4`.

    A layer's sinks take their share of every row (`References.sink_share`), and its cap holds everywhere.

    The same seed and layer draw the same positions.
    """
    positions = observation.query_positions
    group, count = observation.queries.shape[1:3]
    row = torch.arange(count, device=positions.device)
    heads = [(row + turn) % group for turn in range(min(group, ASKED))]
    taken = torch.stack([observation.queries[:, head, row] for head in heads], dim=1).float()

    target = observation.tokens + torch.randint(FUTURE, positions.shape, generator=observation.generator)
    shift = target.to(positions.device) - positions
    queries = observation.rotation.rotate(taken, shift).flatten(1, 2) * observation.scale
    keys, values = observation.keys.float(), observation.values.float()
    answered = min(group, ANSWERED) * count
    own_sinks = observation.softmax.of_groups(observation.heads)  # [H, G]
    sinks = None if own_sinks is None else torch.stack([own_sinks[:, head] for head in heads], dim=1).flatten(1, 2)
    future = attend_all(queries, keys, values, answered, observation.bias, observation.tokens, observation.softmax, sinks)

    newest = window(observation, WINDOW)
    repeat_share = future.repeat_share
    if observation.repeat_peak is not None:
        repeat_share = observation.repeat_peak / observation.tokens**0.5
        asks_alone = repeat_share.square().sum(1, keepdim=True).clamp(max=1)
        repeat_share = repeat_share * asks_alone.sqrt()
    return References(
        queries=torch.cat([future.queries, newest.queries], 1),
        visible=torch.cat([future.visible, newest.visible]),
        log_z=torch.cat([future.log_z, newest.log_z], 1),
        outputs=torch.cat([future.outputs, newest.outputs], 1),
        rms_share=torch.maximum(future.rms_share, newest.rms_share),
        repeat_share=repeat_share,
        sink_share=_together(future.sink_share, newest.sink_share),
    )


def window(observation: Observation, size: int) -> References:
    """The newest `size` queries of every head as they were asked: one at position p sees the tokens up to p.

    `docs/theory.md 4.3`.
    """
    logits = window_logits(observation, size)
    sinks = _sinks_of(observation, logits)
    logits = logits.flatten(1, 2)
    queries = observation.queries[:, :, -size:].flatten(1, 2).float() * observation.scale
    visible = (observation.query_positions[-size:] + 1).repeat(observation.queries.shape[1])
    log_z = log_total(logits, sinks)
    share = logits.sub_(log_z[..., None]).exp_()
    outputs = share @ observation.values.float()
    rms_share = share.square_().mean(1).sqrt_()
    return References(queries, visible, log_z, outputs, rms_share, torch.zeros_like(rms_share), _share_of(sinks, log_z))


def window_shares(observation: Observation, window: int) -> Tensor:
    """Causal softmax shares of the newest queries, [H, G, window, T] float32; see `window_logits`."""
    logits = window_logits(observation, window)
    sinks = _sinks_of(observation, logits)
    return shares(logits, None if sinks is None else sinks.view(logits.shape[:-1]))


def window_logits(observation: Observation, window: int, voted: bool = True) -> Tensor:
    """Causal logits of the newest queries.

    Args:
        observation: What the layer showed.
        window: How many queries; all of them if there are fewer.
        voted: Whether votes count, as in attention. Otherwise logits are scale q·k alone.

    Returns:
        [H, G, window, T] float32; -inf where a query cannot see an entry.
    """
    queries = observation.queries[:, :, -window:].float()
    logits = observation.softmax.capped((queries * observation.scale) @ observation.keys.float()[:, None].transpose(-1, -2))
    if voted and observation.bias is not None:
        logits += observation.bias[:, None, None]
    query_positions = observation.query_positions[-window:]
    hidden = (observation.positions[:, None] > query_positions[:, None]) | ~observation.present[:, None]  # [H, w, T]
    return logits.masked_fill_(hidden[:, None], -torch.inf)


def attend_all(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    answered: int | None = None,
    bias: Tensor | None = None,
    tokens: int | None = None,
    softmax: Softmax = PLAIN,
    sinks: Tensor | None = None,
) -> References:
    """Exact attention of queries over all entries.

    Args:
        queries: [H, R, d], scaled.
        keys: [H, T, d].
        values: [H, T, d_v].
        answered: Only so many rows, the first, are in the result; the others count in the rms share. None: all.
        bias: [H, T], the logarithm of the votes, or None.
        tokens: How many tokens were read. None: every entry is one token.
        softmax: The layer's cap.
        sinks: [H, R], the logit of each row's sink, or None.

    Returns:
        The references, without a repetition.
    """
    rows = queries.shape[1] if answered is None else answered
    (outputs, log_z), rms_share = attend_watched(queries, keys, values, bias, rows, softmax, sinks)
    visible = torch.full((rows,), keys.shape[1] if tokens is None else tokens, device=queries.device)
    sunk = _share_of(None if sinks is None else sinks[:, :rows], log_z)
    return References(queries[:, :rows], visible, log_z, outputs, rms_share, torch.zeros_like(rms_share), sunk)


def _sinks_of(observation: Observation, logits: Tensor) -> Tensor | None:
    """The sink of every row of logits [H, G, w, T], [H, G × w]; None without sinks."""
    return observation.softmax.of_rows(observation.heads, logits.shape[1] * logits.shape[2])


def _share_of(sinks: Tensor | None, log_z: Tensor) -> Tensor | None:
    """The share of the sinks [H, R] in rows of these log-sum-exps."""
    return None if sinks is None else (sinks.to(log_z.dtype) - log_z).exp()


def _together(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second], 1)
