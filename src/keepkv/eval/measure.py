"""Measuring one sample: it is read once for all methods and budgets, and every variant starts from that same reading."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as memo
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv import methods
from keepkv.budget import Budget
from keepkv.cache import KeepCache
from keepkv.errors import InputError
from keepkv.eval import fidelity
from keepkv.eval.config import Config
from keepkv.eval.sample import Question, Sample
from keepkv.methods import Method
from keepkv.recipe import CHUNK
from keepkv.text.ask import greedy
from keepkv.text.conversation import turn_template
from keepkv.text.prompt import Prompt
from keepkv.text.reading import REPEAT, read, read_in_chunks

CONTINUATION = 192  # true next tokens of `fidelity`


class Host(NamedTuple):
    """A model, its tokenizer, and how to measure."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: Config

    @property
    def table(self) -> list[Method]:
        return [methods.get(name) for name in self.config.methods]

    def tokens(self, text: str) -> Tensor:
        """Token ids [1, n] without anything before or after, on the model's device."""
        found: Tensor = self.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]
        return found.to(self.model.device)


@dataclass(frozen=True)
class Outcome:
    """What one question of one variant came to: the fields of a Record that are measured."""

    answer: str
    score: float
    cache: KeepCache
    tokens: int
    seconds: dict[str, float]
    loglik: float | None = None
    chances: tuple[float, ...] = ()
    measures: dict[str, float] = field(default_factory=dict)


Opened = Callable[[Method, str], list[Outcome]]  # (method, budget) -> an outcome for each question


class Ready(NamedTuple):
    """A compressed cache, the tokens it has read, and the seconds of reading, repeating and compressing."""

    cache: KeepCache
    ids: Tensor
    seconds: dict[str, float]


def questions(host: Host, sample: Sample) -> Opened:
    """The text is read and compressed, then each question is asked; question-aware, each has a reading of its own."""
    config = host.config
    if not config.question_aware:
        prompt = Prompt(host.tokenizer, sample.text)
        once = _reading(host, prompt)

        def opened(method: Method, budget: str) -> list[Outcome]:
            ready = once(method, budget)
            return [_ask(host, ready, prompt.question(question.ask), question) for question in sample.questions]

        return opened
    prompts = [Prompt(host.tokenizer, f"{sample.text.strip()}\n\n{question.ask}") for question in sample.questions]
    readings = [_reading(host, prompt) for prompt in prompts]

    def aware(method: Method, budget: str) -> list[Outcome]:
        rows = zip(readings, prompts, sample.questions, strict=True)
        return [_ask(host, reading(method, budget), prompt.question(""), question) for reading, prompt, question in rows]

    return aware


def _reading(host: Host, prompt: Prompt) -> Callable[[Method, str], Ready]:
    """Reads at once, or, for long texts, in chunks: then once for every variant, which compresses on the way."""
    model, config = host.model, host.config
    ids, lead = prompt.text.to(model.device), prompt.question(REPEAT).to(model.device)
    recipe = config.recipe.settled(ids.shape[1])
    if recipe.chunk:

        def chunked(method: Method, budget: str) -> Ready:
            reading = read_in_chunks(model, ids, method, replace(recipe, budget=budget), lead)
            compress = reading.cache.report().compress_seconds
            seconds = {"read": reading.seconds, "repeat": reading.repeat_cost(method), "compress": compress}
            return Ready(reading.cache, ids, seconds)

        return chunked
    once = read(model, ids, host.table, recipe, lead)

    def whole(method: Method, budget: str) -> Ready:
        cache = once.of(method).compress(budget, method)
        compress = cache.report().compress_seconds
        return Ready(cache, ids, {"read": once.seconds, "repeat": once.repeat_cost(method), "compress": compress})

    return whole


def turns(host: Host, sample: Sample) -> Opened:
    """What was said is read turn by turn through a live cache that folds on the way; then each question is the next turn."""
    head, between, after = turn_template(host.tokenizer)
    said = "".join(f"{head if i == 0 else between}{user}{after}\0{answer}\1" for i, (user, answer) in enumerate(sample.turns))
    parts = [part.replace("\0", "") for part in said.split("\1")[:-1]]
    read_ids = [host.tokens(part) for part in parts]

    def opened(method: Method, budget: str) -> list[Outcome]:
        start, whole = time.perf_counter(), torch.cat(read_ids, 1)
        cache = live(host, method, budget, whole.shape[1])
        for piece in read_ids:
            cache.read(host.model, piece)
        if cache.keep_layers[0].tail:
            cache.compress()
        compress = cache.report().compress_seconds
        seconds = {"read": time.perf_counter() - start - compress, "repeat": 0.0, "compress": compress}
        ready = Ready(cache, whole, seconds)
        return [_ask(host, ready, host.tokens(f"{between}{question.ask}{after}"), question) for question in sample.questions]

    return opened


def live(host: Host, method: Method, budget: str, tokens: int) -> KeepCache:
    """A cache that folds every `period` tokens; a share is that of all the tokens it will have read."""
    limit = Budget.parse(budget)
    count = str(max(1, int(limit.amount * tokens))) if limit.kind == "fraction" else budget
    config = host.config
    return KeepCache.of(host.model, replace(config.recipe, budget=count, method=method, chunk=CHUNK, period=config.period))


def _ask(host: Host, ready: Ready, asked: Tensor, question: Question) -> Outcome:
    """By choice: the likeliest, per token, of the right and the wrong answers; by answer: what the model writes."""
    start, asked = time.perf_counter(), asked.to(host.model.device)
    by_choice = host.config.by == "choice"
    if by_choice and not question.wrong:
        raise InputError("there are no wrong answers to choose among: --by answer")
    options = (question.expected, *question.wrong) if by_choice else (question.expected,)
    chances = likelihoods(host, ready.cache, asked, options)
    if by_choice:
        best = max(range(len(options)), key=lambda i: chances[i])
        text, score, more = options[best], float(chances[0] > max(chances[1:])), {}
    else:
        told = greedy(
            host.model, host.tokenizer, ready.cache.fork(), ready.ids, asked, question.ask, host.config.max_new_tokens
        )
        text, score = told.answer, question.score(told.answer)
        more = {name: rule(text) for name, rule in question.more.items()}
    seconds = {**ready.seconds, "answer": time.perf_counter() - start}
    return Outcome(text, score, ready.cache, ready.ids.shape[1], seconds, chances[0], tuple(chances), more)


def likelihoods(host: Host, cache: KeepCache, asked: Tensor, answers: Sequence[str]) -> list[float]:
    """Mean log-probability per token of each answer after the question, which is read once."""
    after, found = cache.fork(), []
    first = host.model(asked, past_key_values=after, logits_to_keep=1).logits[0]
    lead = "" if host.tokenizer.chat_template else " "
    for text in answers:
        answer = host.tokens(lead + text)
        logits = first
        if answer.shape[1] > 1:
            logits = torch.cat([first, host.model(answer[:, :-1], past_key_values=after.fork()).logits[0]])
        found.append(round(float(logits.float().log_softmax(-1).gather(1, answer[0, :, None]).mean()), 6))
    return found


def continued(host: Host, sample: Sample) -> Opened:
    """Language-model fidelity: the true continuation is fed; score: the share of equal most likely tokens.

    measures: kl, mean KL(full || ours) in nats; nll, of a true token in nats. See `fidelity.measure`.
    """
    ids = host.tokens(sample.text)
    context, future = ids[:, :-CONTINUATION], ids[:, -CONTINUATION:]
    once = read(host.model, context, host.table, replace(host.config.recipe, repeat="never"))
    full = memo(lambda: fidelity.log_probs(host.model, once.cache.fork().compress("100%"), future))

    def opened(method: Method, budget: str) -> list[Outcome]:
        cache, start = once.of(method).compress(budget, method), time.perf_counter()
        ours = fidelity.log_probs(host.model, cache, future)
        found = fidelity.compare(full(), ours, future[0, 1:], cache, once)
        nll = -float(ours.gather(1, future[0, 1:, None]).mean())
        seconds = {"read": once.seconds, "repeat": once.repeat_cost(method), "compress": cache.report().compress_seconds}
        seconds["answer"] = time.perf_counter() - start
        measures = {"kl": round(found.kl, 6), "nll": round(nll, 6)}
        return [Outcome("", found.top1, cache, context.shape[1], seconds, -measures["nll"], measures=measures)]

    return opened
