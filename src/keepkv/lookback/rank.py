"""Ranking a text's spans by where a question looks: the question's queries on the index's keys."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from keepkv.cache import KeepCache
from keepkv.errors import KeepKVError
from keepkv.lookback.spans import NEAR, Span
from keepkv.ops.softmax import PLAIN, Softmax, shares
from keepkv.recipe import SPAN

SINKS = 4  # the first tokens of a text, which get attention from everywhere whatever is asked


class Looks(NamedTuple):
    """Where a question looks.

    Attributes:
        spans: Numbers of `spans.tiles`, the best first.
        near: How many of them have `spans.NEAR` of the best one's score or more.
        peak: The share of the best token; 0 if there is none.
    """

    spans: list[int]
    near: int
    peak: float


@torch.no_grad()
def looks(model: PreTrainedModel, cache: KeepCache, question: Tensor, lead: int = SINKS, asking: Span | None = None) -> Looks:
    """Where a question looks in a text that a compact cache stands for.

    The question is read over the compact cache. In every head of the index, a token of the text gets the largest share that one
    of the question's tokens pays it, among all of the text and the question so far. A token's score is the mean over these
    heads, and a span's that of its best token. Never is the question read alone: its queries would ask for something else
    (KVMem, arXiv 2609.04852, loses a quarter of its answers so).

    Args:
        model: The cache's model.
        cache: A compact cache with an index. It is not changed.
        question: Token ids, int64 [1, n].
        lead: The text's first tokens that are not looked for: those of a chat template, and those that get attention from
            everywhere whatever is asked.
        asking: Which of the question's tokens (first, last + 1) count: its own words, without what a chat template puts around
            them, which looks at the same places whatever is asked. None: all.

    Raises:
        KeepKVError: for a cache without an index, and for a batch.
    """
    index = cache.index
    if index is None:
        raise KeepKVError("this cache has no index to look back with: read the text with lookback='auto'")
    if len(question) != 1 or len(cache.starts) != 1:
        raise KeepKVError(f"looking back is for one row, got {len(question)} of a question and {len(cache.starts)} of a cache")
    if not index.tokens:
        return Looks([], 0, 0.0)
    twin = _listening(cache, question.shape[1])
    model(question, past_key_values=twin, logits_to_keep=twin.last_logits)
    scores = []
    for number, head in enumerate(index.heads):
        layer = twin.keep_layers[head.layer]
        assert layer.watch is not None
        watch = layer.watch.banked(layer.state)
        queries = watch.banks[0].queries[head.head, head.query].float() * watch.scale
        softmax = watch.softmax.of_head(layer.heads, head.head, head.query)
        scores.append(peaks(queries, torch.cat(index.keys(number)), layer.keys[0, head.head], asking, softmax))
    return best_spans(torch.stack(scores).mean(0), max(lead, SINKS))


def _listening(cache: KeepCache, tokens: int) -> KeepCache:
    """A fork that watches the queries of what it reads next, and does not compress it."""
    twin = cache.fork()
    twin.restore(None)
    twin.auto, twin.column_mass = False, False
    twin.recipe = replace(cache.recipe, references=max(tokens, cache.recipe.references))
    for layer in twin.keep_layers:
        layer.watch = None
    return twin


def peaks(queries: Tensor, keys: Tensor, newer: Tensor, asking: Span | None = None, softmax: Softmax = PLAIN) -> Tensor:
    """The largest share that one of some queries pays each key.

    Args:
        queries: [n, d] float32, scaled, of the newest n tokens.
        keys: [T, d], of the text.
        newer: [m, d], of what was read exactly behind it; the last n of these ask.
        asking: Which of the queries (first, last + 1) count; None: all.
        softmax: The head's cap and sink.

    Returns:
        [T].
    """
    logits = softmax.capped(queries @ torch.cat([keys.float(), newer.float()]).T)
    later = torch.ones(len(queries), len(queries), dtype=torch.bool, device=keys.device).triu(1)
    logits[:, -len(queries) :].masked_fill_(later, -torch.inf)
    first, last = asking or (0, len(queries))
    return shares(logits, softmax.sinks)[first:last, : len(keys)].amax(0)


def best_spans(scores: Tensor, lead: int) -> Looks:
    """Spans by their best token's score [T]; the first `lead` tokens do not count."""
    scores = scores.clone()
    scores[:lead] = 0
    best = pad(scores, (0, -len(scores) % SPAN)).view(-1, SPAN).amax(1)
    near = int((best >= NEAR * best.max()).sum())
    return Looks(best.sort(descending=True, stable=True).indices.tolist(), near, float(best.max()))
