"""Ask: one text read once, compressed before any question is known, and asked several questions from the same cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from keepkv import methods
from keepkv.budget import TOLERANCE
from keepkv.cache import KeepCache
from keepkv.cache.auto_budget import check, smallest
from keepkv.cache.report import Report
from keepkv.errors import InputError
from keepkv.text.prompt import Prompt
from keepkv.text.reading import REPEAT, Phase, read, read_in_chunks, silent


@dataclass(frozen=True)
class Answer:
    """A question, the answer in words, its tokens, and the seconds after its first token."""

    question: str
    answer: str
    tokens: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Asked:
    """What one method made of the text: the cache right after compression, and the answers from it.

    compress_seconds: everything between reading and answering; reference "recall" if the text was repeated in it.
    alike: of the words (tokens) of the full cache's answers, the share that this cache would have chosen too at the
    same place; None where no full cache was asked. loaded: the cache came out of a file, and prefill_seconds is what that took.
    """

    method: str
    report: Report
    prefill_seconds: float
    compress_seconds: float
    answers: tuple[Answer, ...]
    reference: str = "context"
    alike: float | None = None
    loaded: bool = False

    @property
    def decode_tokens_per_second(self) -> float:
        """Over all answers, counted after each one's first token; 0 where no second token was written."""
        tokens = sum(max(0, len(answer.tokens) - 1) for answer in self.answers)
        return tokens / max(1e-9, sum(answer.seconds for answer in self.answers))

    def to_dict(self) -> dict[str, Any]:
        report = self.report
        whole = not report.kept
        return {
            "method": self.method,
            "budget": report.budget,
            "reference": self.reference,
            "tokens": report.tokens[0],
            "slots": float(report.tokens[0]) if whole else report.slots,
            "form": report.form,
            "kv_bytes_full": report.kv_bytes_full,
            "kv_bytes": report.kv_bytes,
            "loading_seconds" if self.loaded else "prefill_seconds": self.prefill_seconds,
            "compress_seconds": self.compress_seconds,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "alike": self.alike,
            "fallbacks": report.fallbacks,
            "note": report.note,
            "answers": [{"question": answer.question, "answer": answer.answer} for answer in self.answers],
        }


@torch.inference_mode()
def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    questions: Sequence[str],
    method_names: Sequence[str],
    budget: str,
    max_new_tokens: int = 64,
    seed: int = 0,
    reference: str = "auto",
    keep: Sequence[str] = (),
    tolerance: float = TOLERANCE,
    chunk: int = 0,
    phase: Phase = silent,
    slots: str = "float",
) -> list[Asked]:
    """Reads prompt.text once and answers every question with every method, each time from the state after compression.

    reference: "recall" also repeats the text over its own cache and keeps what that asks for, for methods that can use
    it (about one more reading, and details survive); "context" does not; "auto" does where the repetition still fits into
    the trained length. keep: regular expressions; what they match stays verbatim. budget "auto": the smallest at which the
    first method loses at most `tolerance` (see `smallest`). chunk: read so many tokens at a time and compress on the way,
    once for each method; 0 reads all at once, for all methods together. slots: how they are stored, see `KeepCache`.
    phase(title) starts a phase and returns what to tell its progress to. A method named "full" is what the others' `alike`
    is measured against.
    Raises BudgetError, MethodError, InputError.
    """
    table = [methods.get(name) for name in method_names]
    if budget == "auto":
        check(table[0], tolerance)
        if chunk:
            raise InputError("a budget is found by trying several on the whole text: give one, or read all at once (--chunk 0)")
    spans = prompt.spans(*keep)
    torch.manual_seed(seed)
    ids = prompt.text.to(model.device)
    lead = prompt.question(REPEAT).to(model.device)
    if not chunk:
        done = read(model, ids, table, lead, seed, reference, phase, slots)

    asked, caches = [], []
    for method in table:
        if chunk:
            done = read_in_chunks(model, ids, method, budget, chunk, lead, seed, reference, spans, phase, slots)
            cache, compressing = done.cache, done.cache.report().compress_seconds
        else:
            tell = phase(f"compressing ({method.name})")
            start = time.perf_counter()
            if budget == "auto":
                cache = smallest(done.of(method), method, tolerance, tell, spans)
                budget = cache.report().budget  # the other methods get as much
            else:
                cache = done.of(method).compress(budget, method, tell, spans)
            compressing = time.perf_counter() - start
        caches.append(cache)
        report, answers = cache.report(), []
        tell = phase(f"answering ({method.name})")
        for index, question in enumerate(questions):
            later = prompt.question(question).to(model.device)
            answers.append(greedy(model, tokenizer, cache.fork(), ids, later, question, max_new_tokens))
            tell(index + 1, len(questions))
        seconds = compressing + done.repeat_cost(method)
        asked.append(Asked(method.name, report, done.seconds, seconds, tuple(answers), done.reference(method)))

    full = next((result for result in asked if result.method == "full"), None)
    if full is None:
        return asked
    phase("comparing")
    alike = []
    for cache in caches:
        same = [_agreement(model, cache.fork(), prompt.question(answer.question), answer.tokens) for answer in full.answers]
        alike.append(sum(hits for hits, _ in same) / max(1, sum(count for _, count in same)))
    return [replace(result, alike=share) for result, share in zip(asked, alike, strict=True)]


def generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float = 0.0
) -> GenerationConfig:
    """How an answer is written, whatever else the model's own configuration says: temperature 0 is greedy."""
    own = model.generation_config
    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else tokenizer.eos_token_id,
        **({"temperature": temperature} if temperature > 0 else {}),
    )  # fmt: skip


class _Clock(BaseStreamer):
    """Notes when the first and the last token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: KeepCache, ids: Tensor, later: Tensor,
    question: str, max_new_tokens: int,
) -> Answer:  # fmt: skip
    """Greedy decoding of one answer after `later` = question tokens, from a cache that has read `ids`."""
    clock = _Clock()
    prompt = torch.cat([ids, later], dim=1)
    generate: Any = model.generate
    output = generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        generation_config=generation(model, tokenizer, max_new_tokens),
        streamer=clock,
    )
    new = output[0, prompt.shape[1] :].tolist()
    first, last = clock.times[1], clock.times[-1]  # the streamer is given the prompt first
    return Answer(question, str(tokenizer.decode(new, skip_special_tokens=True)).strip(), tuple(new), last - first)


def _agreement(model: PreTrainedModel, cache: KeepCache, later: Tensor, answer: Sequence[int]) -> tuple[int, int]:
    """How many of the answer's tokens this cache would have chosen at their places, and how many there are."""
    target = torch.tensor([answer], device=model.device)
    fed = torch.cat([later.to(model.device), target], dim=1)
    logits = model(fed, past_key_values=cache, logits_to_keep=len(answer) + 1).logits[0, :-1]
    return int((logits.argmax(-1) == target[0]).sum()), len(answer)
