"""Choose: which entries keep a slot, given scores and counts. Papers say select."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keepkv.ops import least_squares
from keepkv.ops.ragged import Ragged, groups
from keepkv.types import Choice, Observation

MANY = 512  # a head of more slots keeps its best entries, without elimination


def protect(scores: Tensor, positions: Tensor, tokens: int, slots: float, sinks: int, recent: int | float) -> Tensor:
    """Scores with +inf on the first and the newest tokens, which are always kept.

    Small budgets protect fewer: with n slots per head on average, at most n/4 first tokens, and at most n/2 newest ones. Where
    `recent` is a share it belongs to the method, and may take all that the first tokens leave.

    Args:
        scores: [..., T]. A score of -inf stays: there is no such entry.
        positions: [..., T], of the entries.
        tokens: How many tokens were read.
        slots: Slots per head on average.
        sinks: How many of the first tokens.
        recent: How many of the newest tokens, or, below 1, the share of the slots that goes to them.

    Returns:
        [..., T].
    """
    sinks = min(sinks, int(slots) // 4)
    if recent < 1:
        newest = min(int(slots) - sinks, int(recent * slots))
    else:
        newest = min(int(recent), int(slots) // 2)
    protected = (positions < sinks) | (positions >= tokens - newest)
    return scores.masked_fill(protected & ~scores.isneginf(), torch.inf)


def best(scores: Tensor, count: int) -> Tensor:
    """The `count` best entries of one head, from scores [T]: ascending int64 [count]. Of equals the earliest win.

    Example:
        >>> best(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3)
        tensor([1, 2, 3])
    """
    order = scores.argsort(descending=True, stable=True)
    return order[:count].sort().values


def top(observation: Observation, scores: Tensor, counts: Sequence[int]) -> list[Choice]:
    """Every head keeps its entries with the best scores. Of equals the earliest win."""
    return [Choice(best(*head)) for head in zip(scores, counts, strict=True)]


def eliminate(
    observation: Observation, scores: Tensor, counts: Sequence[int], spare: int = 64, rounds: int = 3, strength: float = 1e-4
) -> list[Choice]:
    """Every head starts with 64 (`spare`) more candidates than slots, and drops those whose part the others can play.

    The slots must reach the output of every reference row and, as one more column of the same size, its mass. Entries with a
    score of +inf stay. Heads of more than 512 slots keep the best scores, which is hardly worse, so that no matrix grows with
    the length of the text. `docs/theory.md 5.4`; optimal brain surgeon, Hassibi and Stork, NIPS 1992.

    Args:
        observation: What the layer showed, with its references.
        scores: [H, T].
        counts: [H], the slots of every head.
        spare: Candidates beyond the slots.
        rounds: In so many rounds the surplus is dropped.
        strength: The ridge, as a share of the mean diagonal of the Gram matrix.

    Returns:
        One choice for each head.
    """
    chosen: list[Choice] = []
    most = [count + (spare if count <= MANY else 0) for count in counts]
    candidates = [best(own, min(limit, n)) for own, limit, n in zip(scores, most, observation.counts, strict=True)]
    # Candidates of the heads that have a choice at all; 0 for the others.
    sizes = [len(own) if len(own) > count else 0 for own, count in zip(candidates, counts, strict=True)]
    largest = max(sizes)
    for heads in groups(len(counts), scores.device, largest * max(largest, observation.reference_rows)):
        if not any(sizes[heads]):
            chosen += [Choice(kept) for kept in candidates[heads]]
            continue
        columns = Ragged.of([own[:size] for own, size in zip(candidates[heads], sizes[heads], strict=True)])
        rows = observation.rows(heads)
        share = rows.on(columns)
        repeat_share = columns.pick(rows.repeat_share) * columns.real

        # Every reference row wants its exact output, and as much mass: one more column, as large as an output is.
        mass = rows.outputs.square().sum(-1).mean(-1).sqrt()[:, None, None]
        unsunk = (1 - torch.as_tensor(rows.sunk, device=mass.device))[..., None]
        wanted = torch.cat([rows.outputs, (mass * unsunk).expand(-1, share.shape[1], 1)], 2)
        gram, target = least_squares.normal(share, repeat_share, wanted)
        # Whoever repeats the text asks for one token alone, and wants its value and its mass.
        values = columns.pick(observation.values[heads]).float()
        own_output = torch.cat([values, mass.expand(-1, values.shape[1], 1)], 2)
        target += share.shape[1] * repeat_share[..., None].square() * own_output

        fixed = columns.pick(scores[heads]).isposinf()
        goals = [count if size else 0 for size, count in zip(sizes[heads], counts[heads], strict=True)]
        stay = least_squares.eliminate(gram, target, fixed, sizes[heads], goals, rounds, strength)
        order = torch.where(stay, columns.entries, observation.entries).sort(1).values  # what goes is sorted to the end
        of_heads = zip(order, candidates[heads], sizes[heads], counts[heads], strict=True)
        chosen += [Choice(kept[:count] if size else own) for kept, own, size, count in of_heads]
    return chosen


def shifted(kept: Tensor, target: Tensor, first: int) -> Choice:
    """A choice among the real entries of a head, as one among all: the `first` ones only fill up. See `Choice`."""
    return Choice(kept + first, torch.cat([target.new_full((first,), -1), target]))
