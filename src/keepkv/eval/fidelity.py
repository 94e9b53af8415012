"""Fidelity: how far a compressed cache's next-token distributions are from the full cache's, on true text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv.cache import KeepCache
from keepkv.errors import InputError
from keepkv.methods import get
from keepkv.recipe import Recipe
from keepkv.text.reading import Reading, read


@dataclass(frozen=True)
class Fidelity:
    """How far one method at one budget is from the full cache. Means over segments of a text.

    Args:
        method: The method's name.
        budget: The budget in words.
        delta_nll: Rise of the negative log-likelihood of a true token, in nats.
        kl: KL(full || compressed) of the next-token distributions, in nats.
        top1: Share of positions at which both have the same most likely token.
        kv_bytes: Bytes of a segment's compressed cache.
        kv_bytes_full: Bytes of its full cache.
        prefill_seconds: Seconds of reading a segment.
        compress_seconds: Seconds of compressing it, with the repetition if the method uses it.
        segments: Number of segments.
        context_tokens: Tokens of a segment that are compressed.
        continuation_tokens: True next tokens that are fed.
        fallbacks: How often the method fell back to eviction, in all segments together.
        error: What the method itself predicts (`Report.error`).
        kl_per_segment: The same as `kl` for each segment.
        error_per_segment: The same as `error` for each segment.
        slot_dtype: How slots are stored.
    """

    method: str
    budget: str
    delta_nll: float
    kl: float
    top1: float
    kv_bytes: int
    kv_bytes_full: int
    prefill_seconds: float
    compress_seconds: float
    segments: int
    context_tokens: int
    continuation_tokens: int
    fallbacks: int
    error: float
    kl_per_segment: tuple[float, ...]
    error_per_segment: tuple[float, ...]
    slot_dtype: str = "float"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def steps(segments: int, method_names: Sequence[str], budgets: Sequence[str], slot_dtypes: Sequence[str] = ("float",)) -> int:
    """How many steps `measure` takes: `progress` is called after each of them."""
    return segments * (1 + len(method_names) * len(budgets) * len(slot_dtypes))


def split_into_segments(
    tokenizer: PreTrainedTokenizerBase, text: str, segments: int, context: int, continuation: int
) -> Tensor:
    """Evenly spread segments of a text; each starts with the model's BOS token if it has one.

    Args:
        tokenizer: The model's.
        text: At least one segment long.
        segments: How many; fewer if the text has no room for different ones.
        context: Tokens of a segment that are compressed.
        continuation: Tokens of a segment that follow.

    Returns:
        Token ids, int64 [segments, context + continuation].

    Raises:
        InputError: if the text is too short for one segment, or a number is too small.
    """
    if segments < 1 or context < 16 or continuation < 2:
        raise InputError("expected at least 1 segment, 16 context tokens and 2 continuation tokens")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer("", verbose=False)["input_ids"][:1]
    need = context + continuation - len(bos)
    if len(ids) < need:
        raise InputError(
            f"the text has {len(ids)} tokens, fewer than the {context} + {continuation} needed: "
            "give a longer text, or smaller --context-tokens or --continuation-tokens"
        )
    room = len(ids) - need
    starts = [i * room // max(1, segments - 1) for i in range(segments)]
    return torch.tensor([bos + ids[start : start + need] for start in dict.fromkeys(starts)])


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    segments: Tensor,
    continuation: int,
    method_names: Sequence[str],
    budgets: Sequence[str],
    recipe: Recipe | None = None,
    slot_dtypes: Sequence[str] = (Recipe.slot_dtype,),
    progress: Callable[[int], None] = lambda step: None,
) -> list[Fidelity]:
    """Compresses the context of every segment in every way, and feeds the true continuation.

    All ways start from the same reading of a segment, so that they differ in the compression alone (paired comparison).

    Args:
        model: A causal language model of transformers.
        segments: Token ids, int64 [segments, context + continuation] (see `split_into_segments`).
        continuation: How many tokens at the end of a segment are the continuation.
        method_names: Methods to compare.
        budgets: Budgets to compare.
        recipe: Its `repeat` (without a recipe: never), `seed` and `full_dtype` are used.
        slot_dtypes: Slot dtypes to compare.
        progress: Called with the number of finished steps, after each of them (see `steps`).

    Returns:
        One result for every budget, method and slot dtype, in this order.

    Raises:
        MethodError: for an unknown method.
        BudgetError: for a budget that cannot be read, or is too small for a segment.
    """
    recipe = recipe or Recipe(repeat="never")
    methods = [get(name) for name in method_names]
    comparisons: dict[tuple[str, str, str], list[Comparison]] = {}
    step = 0
    for segment in segments.to(model.device):
        context, future = segment[None, :-continuation], segment[None, -continuation:]
        reading = read(model, context, methods, recipe)
        full = log_probs(model, reading.cache.fork().compress("100%"), future)
        step += 1
        progress(step)
        for budget, method, slot_dtype in product(budgets, methods, slot_dtypes):
            cache = reading.of(method).compress(budget, method, slot_dtype=slot_dtype)
            ours = log_probs(model, cache, future)
            variant = method.name, budget, slot_dtype
            comparisons.setdefault(variant, []).append(compare(full, ours, future[0, 1:], cache, reading))
            step += 1
            progress(step)
    context_tokens = segments.shape[1] - continuation
    return [_mean(*variant, results, context_tokens, continuation) for variant, results in comparisons.items()]


@dataclass(frozen=True)
class Comparison:
    """One compressed cache beside the full one, on one segment. The fields are those of `Fidelity`."""

    delta_nll: float
    kl: float
    top1: float
    kv_bytes: int
    kv_bytes_full: int
    prefill_seconds: float
    compress_seconds: float
    fallbacks: int
    error: float


def log_probs(model: PreTrainedModel, cache: KeepCache, future: Tensor) -> Tensor:
    """Log-probabilities [n-1, vocabulary], float32, of what follows each of the n tokens but the last."""
    logits: Tensor = model(future, past_key_values=cache.fork()).logits
    return logits[0, :-1].float().log_softmax(-1)


def compare(full: Tensor, ours: Tensor, truth: Tensor, cache: KeepCache, reading: Reading) -> Comparison:
    """Compares log-probabilities [n, vocabulary] of the full and the compressed cache, given the true tokens [n]."""
    report = cache.report()
    return Comparison(
        delta_nll=float(cross_entropy(ours, truth) - cross_entropy(full, truth)),
        kl=float(kl_div(ours.double(), full.double(), reduction="batchmean", log_target=True)),
        top1=float((ours.argmax(-1) == full.argmax(-1)).float().mean()),
        kv_bytes=report.kv_bytes,
        kv_bytes_full=report.kv_bytes_full,
        prefill_seconds=reading.seconds,
        compress_seconds=report.compress_seconds + reading.repeat_cost(cache.policy.method),
        fallbacks=report.fallbacks,
        error=report.error,
    )


def _mean(
    method: str, budget: str, slot_dtype: str, results: Sequence[Comparison], context: int, continuation: int
) -> Fidelity:
    def mean(name: str) -> float:
        return statistics.fmean(getattr(result, name) for result in results)

    return Fidelity(
        method=method,
        budget=budget,
        delta_nll=mean("delta_nll"),
        kl=mean("kl"),
        top1=mean("top1"),
        kv_bytes=round(mean("kv_bytes")),
        kv_bytes_full=round(mean("kv_bytes_full")),
        prefill_seconds=mean("prefill_seconds"),
        compress_seconds=mean("compress_seconds"),
        segments=len(results),
        context_tokens=context,
        continuation_tokens=continuation,
        fallbacks=sum(result.fallbacks for result in results),
        error=mean("error"),
        kl_per_segment=tuple(result.kl for result in results),
        error_per_segment=tuple(result.error for result in results),
        slot_dtype=slot_dtype,
    )
