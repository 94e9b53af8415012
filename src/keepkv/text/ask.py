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
from keepkv.cache import KeepCache
from keepkv.cache.auto_budget import check_tolerance, compress_to_tolerance
from keepkv.cache.report import Report
from keepkv.errors import InputError
from keepkv.lookback.look_back import Looking, Sources
from keepkv.recipe import Recipe
from keepkv.text.prompt import NEXT_QUESTION, Prompt
from keepkv.text.reading import REPEAT, Phase, read, read_in_chunks, silent


@dataclass(frozen=True)
class Answer:
    """A question and its answer.

    Attributes:
        question: What was asked.
        answer: The answer in words.
        tokens: Its tokens.
        seconds: From its first token to its last.
        sources: What was looked back at for it; None if nothing was to be.
    """

    question: str
    answer: str
    tokens: tuple[int, ...]
    seconds: float
    sources: Sources | None = None

    def to_dict(self) -> dict[str, Any]:
        """Question, answer and sources, for JSON."""
        sources = {"looked_back": self.sources.to_dict()} if self.sources else {}
        return {"question": self.question, "answer": self.answer, **sources}


@dataclass(frozen=True)
class AskResult:
    """What one method made of the text: the report of its cache right after compression, and the answers from it.

    Attributes:
        method: The method's name.
        report: Of the cache that answered.
        prefill_seconds: Of reading the text or, if the cache was `loaded`, of loading.
        compress_seconds: Everything between reading and answering.
        answers: One for each question.
        repeated: Whether the text was repeated before it was compressed.
        alike: Of the tokens of the full cache's answers, the share that this cache would have chosen at the same place; None
            where no full cache was asked.
        loaded: Whether the cache came out of a file.
    """

    method: str
    report: Report
    prefill_seconds: float
    compress_seconds: float
    answers: tuple[Answer, ...]
    repeated: bool = False
    alike: float | None = None
    loaded: bool = False

    @property
    def decode_tokens_per_second(self) -> float:
        """Over all answers, counted after each one's first token; 0 where no second token was written."""
        tokens = sum(max(0, len(answer.tokens) - 1) for answer in self.answers)
        return tokens / max(1e-9, sum(answer.seconds for answer in self.answers))

    def to_dict(self) -> dict[str, Any]:
        """What `keepkv ask --json` prints."""
        report = self.report
        whole = not report.kept
        return {
            "method": self.method,
            "budget": report.budget,
            "repeated": self.repeated,
            "tokens": report.tokens[0],
            "slots_per_head": float(report.tokens[0]) if whole else report.slots_per_head,
            "slot_dtype": report.slot_dtype,
            "kv_bytes_full": report.kv_bytes_full,
            "kv_bytes": report.kv_bytes,
            "loading_seconds" if self.loaded else "prefill_seconds": self.prefill_seconds,
            "compress_seconds": self.compress_seconds,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "alike": self.alike,
            "fallbacks": report.fallbacks,
            "note": report.note,
            "index_bytes": report.index_bytes,
            "answers": [answer.to_dict() for answer in self.answers],
        }


@torch.inference_mode()
def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    questions: Sequence[str],
    recipe: Recipe | None = None,
    compare: Sequence[str] = (),
    max_new_tokens: int = 64,
    phase: Phase = silent,
) -> list[AskResult]:
    """Reads prompt.text once and answers every question with every method, each time from the state after compression.

    Args:
        model: Any supported model.
        tokenizer: Its tokenizer.
        prompt: The text.
        questions: Each is asked on its own, right after the text.
        recipe: How the text is compressed. With a chunk it is read so many tokens at a time, once for each method; with 0 it
            is read at once, for all methods together.
        compare: Names of more methods, with the same budget. What a method named "full" answers is what the others' `alike`
            is measured against.
        max_new_tokens: Of each answer, at most.
        phase: phase(title) starts a phase and returns what to tell its progress to.

    Returns:
        What each method made of the text, the recipe's first.

    Raises:
        BudgetError, MethodError, InputError: for a recipe that this text cannot be compressed with.
    """
    recipe = (recipe or Recipe()).settled(prompt.text.shape[1])
    recipe.refuse("answers, only on documents", "exact")
    table = [methods.get(name) for name in (recipe.method, *compare)]
    if recipe.auto_budget:
        check_tolerance(table[0], recipe.tolerance)
        if recipe.chunk:
            raise InputError("a budget is found by trying several on the whole text: give one, or read all at once (--chunk 0)")
    spans = prompt.spans(*recipe.keep)
    torch.manual_seed(recipe.seed)
    ids = prompt.text.to(model.device)
    lead = prompt.question(REPEAT).to(model.device)
    looking = Looking.of(model, tokenizer, ids, recipe, prompt.lead, prompt.question(""))
    if not recipe.chunk:
        reading = read(model, ids, table, recipe, lead, phase)

    results = []
    caches = []
    for method in table:
        if recipe.chunk:
            reading = read_in_chunks(model, ids, method, recipe, lead, spans, phase)
            cache = reading.cache
            compressing = cache.report().compress_seconds
        else:
            progress = phase(f"compressing ({method.name})")
            start = time.perf_counter()
            if recipe.auto_budget:
                cache = compress_to_tolerance(reading.of(method), method, recipe.tolerance, progress, spans)
                recipe = replace(recipe, budget=cache.report().budget)  # the other methods get as much
            else:
                cache = reading.of(method).compress(recipe.budget, method, progress, spans)
            compressing = time.perf_counter() - start
        caches.append(cache)
        report = cache.report()
        progress = phase(f"answering ({method.name})")
        answers = []
        for index, question in enumerate(questions):
            later = prompt.question(question).to(model.device)
            fork, sources = looking.back(cache, later, question) if looking else (cache.fork(), None)
            answer = greedy(model, tokenizer, fork, ids, later, question, max_new_tokens)
            answers.append(replace(answer, sources=sources))
            progress(index + 1, len(questions))
        seconds = compressing + reading.repeat_cost(method)
        repeated = reading.is_repeated(method)
        results.append(AskResult(method.name, report, reading.seconds, seconds, tuple(answers), repeated))

    full = next((result for result in results if result.method == "full"), None)
    if full is None:
        return results
    phase("comparing")
    alike = [_alike(model, cache, prompt, full.answers, looking) for cache in caches]
    return [replace(result, alike=share) for result, share in zip(results, alike, strict=True)]


def generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float = 0.0
) -> GenerationConfig:
    """How an answer is written, whatever else the model's own configuration says; temperature 0 is greedy decoding."""
    own = model.generation_config
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else tokenizer.eos_token_id,
        **({"temperature": temperature} if temperature > 0 else {}),
    )


class _Clock(BaseStreamer):
    """Notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: KeepCache,
    ids: Tensor,
    later: Tensor,
    question: str,
    max_new_tokens: int,
) -> Answer:
    """Greedy decoding of one answer, from a cache that has read the text `ids` [1, T], after the question's tokens [1, n]."""
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
    seconds = clock.times[-1] - clock.times[1]  # the streamer is given the prompt first
    answer = str(tokenizer.decode(new, skip_special_tokens=True)).strip()
    if not tokenizer.chat_template:
        answer = answer.partition(NEXT_QUESTION)[0].rstrip()  # a base model goes on with a question of its own
    return Answer(question, answer, tuple(new), seconds)


def _alike(
    model: PreTrainedModel, cache: KeepCache, prompt: Prompt, answers: Sequence[Answer], looking: Looking | None
) -> float:
    """Of the tokens of some answers, the share that this cache would have chosen at their places."""
    counts = []
    for answer in answers:
        later = prompt.question(answer.question).to(model.device)
        fork = looking.back(cache, later, answer.question).cache if looking else cache.fork()
        counts.append(_agreement(model, fork, later, answer.tokens))
    return sum(same for same, _ in counts) / max(1, sum(of for _, of in counts))


def _agreement(model: PreTrainedModel, cache: KeepCache, later: Tensor, answer: Sequence[int]) -> tuple[int, int]:
    """How many of the answer's tokens this cache would have chosen at their places, and how many there are."""
    target = torch.tensor([answer], device=model.device)
    ids = torch.cat([later.to(model.device), target], dim=1)
    logits = model(ids, past_key_values=cache, logits_to_keep=len(answer) + 1).logits[0, :-1]
    return int((logits.argmax(-1) == target[0]).sum()), len(answer)
