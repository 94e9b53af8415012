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

from keepkv import methods
from keepkv.cache import KeepCache
from keepkv.errors import InputError
from keepkv.recipe import Recipe
from keepkv.text.reading import Reading, read


@dataclass(frozen=True)
class Fidelity:
    """One method at one budget, means over segments. delta_nll in nats per token; kl, mean KL(full || compressed) in nats;
    top1, share of positions with the same most likely token; bytes of one segment's cache; seconds per segment; error, what
    the method itself predicts (Report.error)."""

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
    slot_dtype: str = "float"  # how slots are stored

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def steps(segments: int, method_names: Sequence[str], budgets: Sequence[str], slot_dtypes: Sequence[str] = ("float",)) -> int:
    """How many steps `measure` takes."""
    return segments * (1 + len(method_names) * len(budgets) * len(slot_dtypes))


def cut(tokenizer: PreTrainedTokenizerBase, text: str, segments: int, context: int, continuation: int) -> Tensor:
    """Evenly spread stretches of the text, [segments, context + continuation]; each starts with the model's BOS if any.

    Raises InputError if the text is too short for one stretch, or the numbers cannot be used.
    """
    if segments < 1 or context < 16 or continuation < 2:
        raise InputError("expected at least 1 segment, 16 context tokens and 2 continuation tokens")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer("", verbose=False)["input_ids"][:1]
    need = context + continuation - len(bos)
    if len(ids) < need:
        raise InputError(
            f"the text has {len(ids)} tokens, fewer than the {context} + {continuation} needed: "
            "give a longer text, or fewer --context-tokens or --continuation-tokens"
        )
    starts = [i * (len(ids) - need) // max(1, segments - 1) for i in range(segments)]
    return torch.tensor([bos + ids[start : start + need] for start in dict.fromkeys(starts)])


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    stretches: Tensor,
    continuation: int,
    method_names: Sequence[str],
    budgets: Sequence[str],
    recipe: Recipe | None = None,
    slot_dtypes: Sequence[str] = (Recipe.slot_dtype,),
    tick: Callable[[int], None] = lambda done: None,
) -> list[Fidelity]:
    """Reads each stretch but its last `continuation` tokens, compresses in every way, and feeds the true continuation.

    recipe: its repeat (if not given, never) and seed. Every variant starts from the same reading, so that differences are the
    compression's alone (paired). tick(done) is told after each of `steps`.
    """
    recipe = recipe or Recipe(repeat="never")
    table = [methods.get(name) for name in method_names]
    samples: dict[tuple[str, str, str], list[_Sample]] = {}
    done = 0
    for stretch in stretches.to(model.device):
        context, future = stretch[None, :-continuation], stretch[None, -continuation:]
        reading = read(model, context, table, recipe)
        full = log_probs(model, reading.cache.fork().compress("100%"), future)
        tick(done := done + 1)
        for budget, method, slot_dtype in product(budgets, table, slot_dtypes):
            cache = reading.of(method).compress(budget, method, slot_dtype=slot_dtype)
            samples.setdefault((method.name, budget, slot_dtype), []).append(
                compare(full, log_probs(model, cache, future), future[0, 1:], cache, reading)
            )
            tick(done := done + 1)
    size = stretches.shape[1] - continuation
    return [_mean(*variant, own, size, continuation) for variant, own in samples.items()]


@dataclass(frozen=True)
class _Sample:
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


def compare(full: Tensor, ours: Tensor, truth: Tensor, cache: KeepCache, reading: Reading) -> _Sample:
    report = cache.report()
    return _Sample(
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


def _mean(method: str, budget: str, slot_dtype: str, samples: Sequence[_Sample], context: int, continuation: int) -> Fidelity:
    def mean(name: str) -> float:
        return statistics.fmean(getattr(sample, name) for sample in samples)

    return Fidelity(
        method, budget, mean("delta_nll"), mean("kl"), mean("top1"), round(mean("kv_bytes")), round(mean("kv_bytes_full")),
        mean("prefill_seconds"), mean("compress_seconds"), len(samples), context, continuation,
        sum(sample.fallbacks for sample in samples), mean("error"), tuple(sample.kl for sample in samples),
        tuple(sample.error for sample in samples), slot_dtype,
    )  # fmt: skip
