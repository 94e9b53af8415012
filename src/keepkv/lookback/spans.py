"""Spans: stretches of a text that are looked up and brought back, as (first token, last token + 1). Pure integers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from keepkv.errors import InputError
from keepkv.recipe import SPAN

Span = tuple[int, int]

LEFT = 16  # tokens that are brought back before it
NEAR = 0.7  # of the best span's score: others that have less do not come back. They bring what is easily mistaken: docs/notes
RIGHT = 48  # and behind it: an answer follows what it is looked up by


def tiles(tokens: int) -> list[Span]:
    """A text's spans: every token is in exactly one of them. The last one may be shorter.

    Example:
        >>> tiles(150)
        [(0, 64), (64, 128), (128, 150)]
    """
    return [(first, min(first + SPAN, tokens)) for first in range(0, tokens, SPAN)]


def allowed(ranked: Iterable[int], tokens: int, allowance: int) -> list[Span]:
    """The best spans with what stands around them, in the text's order, of at most `allowance` tokens together.

    A span is widened by 16 tokens to the left and 48 to the right, cut at the text's ends, or by nothing where the allowance
    is less than such a span. One that no longer fits is passed over, and so is everything behind it.

    Args:
        ranked: Numbers of spans of `tiles`, the best first.
        tokens: Of the text.
        allowance: Tokens.

    Returns:
        Disjoint spans; what touches is one.

    Raises:
        InputError: for an allowance of less than one span.

    Example:
        >>> allowed([3, 1, 9], tokens=1000, allowance=256)
        [(48, 304)]
    """
    if allowance < SPAN:
        raise InputError(f"lookback={allowance}: expected at least {SPAN} tokens, or 'off'")
    wide = allowance >= LEFT + SPAN + RIGHT
    taken: list[Span] = []
    for number in ranked:
        first, last = number * SPAN, min((number + 1) * SPAN, tokens)
        if wide:
            first, last = max(0, first - LEFT), min(tokens, last + RIGHT)
        together = united([*taken, (first, last)])
        if count(together) > allowance:
            break
        taken = together
    return taken


def united(spans: Sequence[Span]) -> list[Span]:
    """Disjoint spans of the same tokens, in order.

    Example:
        >>> united([(8, 12), (0, 4), (3, 8)])
        [(0, 12)]
    """
    result: list[Span] = []
    for first, last in sorted(spans):
        if result and first <= result[-1][1]:
            result[-1] = result[-1][0], max(last, result[-1][1])
        else:
            result.append((first, last))
    return result


def count(spans: Sequence[Span]) -> int:
    """Tokens of disjoint spans."""
    return sum(last - first for first, last in spans)


def difference(tokens: Sequence[int], other: Sequence[int]) -> Span:
    """Where tokens differ from others: (first, last + 1), without what both begin and end with. All of them where nothing does.

    Example:
        >>> difference([1, 2, 7, 8, 3], [1, 2, 3])
        (2, 4)
    """
    most = min(len(tokens), len(other))
    before = next((i for i in range(most) if tokens[i] != other[i]), most)
    after = next((i for i in range(most - before) if tokens[-1 - i] != other[-1 - i]), most - before)
    return (before, len(tokens) - after) if before + after < len(tokens) else (0, len(tokens))


def in_turn(*rankings: Sequence[int]) -> list[int]:
    """Several rankings as one: the best of each, then the second of each, and so on; each number once.

    Example:
        >>> in_turn([5, 7, 1], [7, 2])
        [5, 7, 2, 1]
    """
    longest = max(map(len, rankings), default=0)
    return list(dict.fromkeys(ranking[i] for i in range(longest) for ranking in rankings if i < len(ranking)))
