"""Measuring one sample: its text is read once, and every method, budget and slot dtype starts from that same reading."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as memo
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv.budget import MIN_SLOTS, Budget
from keepkv.cache import KeepCache
from keepkv.cache.policy import Policy
from keepkv.errors import InputError
from keepkv.eval import fidelity
from keepkv.eval.config import Config
from keepkv.eval.sample import Question, Sample
from keepkv.eval.writing import write
from keepkv.lookback.look_back import Looking, indexed
from keepkv.methods import Method, get
from keepkv.models.families import is_compressed, key_shape, layer_kinds
from keepkv.recipe import CHUNK, Recipe
from keepkv.text.conversation import turn_template
from keepkv.text.prompt import Prompt
from keepkv.text.reading import REPEAT, read, read_in_chunks

CONTINUATION = 192  # true next tokens of `fidelity`


class Setup(NamedTuple):
    """What every measurement of a run shares: a loaded model, its tokenizer, the run's settings and its methods."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: Config
    methods: tuple[Method, ...] = ()

    def tokens(self, text: str) -> Tensor:
        """Token ids [1, n] without special tokens, on the model's device."""
        ids: Tensor = self.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]
        return ids.to(self.model.device)


@dataclass(frozen=True)
class Outcome:
    """What was measured of one question with one variant (a method at a budget, and how its slots are stored).

    Args:
        answer: What the model answered, or the likeliest of the answers it could choose from.
        score: The task's score of that answer, from 0 to 1.
        cache: The compressed cache that the question was asked of.
        tokens: Tokens of the text.
        seconds: Of "read", "repeat", "compress" and "answer".
        loglik: Mean log-probability of a token of the expected answer, in nats.
        chances: The same of every answer to choose from, the expected one first.
        measures: The task's further measures by name.
        slots: Slots per KV head on average; None: the cache's.
        kv_bytes: Bytes that were needed, and bytes of the full cache; None: the cache's.
    """

    answer: str
    score: float
    cache: KeepCache
    tokens: int
    seconds: dict[str, float]
    loglik: float | None = None
    chances: tuple[float, ...] = ()
    measures: dict[str, float] = field(default_factory=dict)
    slots: float | None = None
    kv_bytes: tuple[int, int] | None = None


Measure = Callable[[Recipe], list[Outcome]]  # a variant's recipe -> an outcome for each question


class CompressedReading(NamedTuple):
    """A compressed cache, and what it has read.

    Attributes:
        cache: The cache.
        ids: The ids [1, n].
        seconds: Of reading, repeating and compressing.
        looking: What looks back at the text for each question; None: nothing does.
    """

    cache: KeepCache
    ids: Tensor
    seconds: dict[str, float]
    looking: Looking | None = None

    def back(self, question_ids: Tensor, question: Question) -> tuple[CompressedReading, dict[str, float]]:
        """The same for one question, with what came back for it and the seconds that took, and the measures of that."""
        if self.looking is None or not self.cache.report().kept:
            return self, {}
        cache, sources = self.looking.back(self.cache, question_ids, question.ask)
        measures = {"looked_back_tokens": float(sources.tokens), "looked_back_bytes": float(sources.bytes)}
        measures["index_bytes"] = float(sources.index_bytes)
        return self._replace(cache=cache, seconds={**self.seconds, "lookback": sources.seconds}), measures


def prepare_questions(setup: Setup, sample: Sample) -> Measure:
    """The text is read and compressed, then each question is asked; question-aware, each has a reading of its own."""
    config = setup.config
    if not config.question_aware:
        prompt = Prompt(setup.tokenizer, sample.text)
        compress = _prepare_reading(setup, prompt)

        def measure(recipe: Recipe) -> list[Outcome]:
            reading = compress(recipe)
            return asked(setup, reading, [prompt.question(question.ask) for question in sample.questions], sample.questions)

        return measure
    prompts = [Prompt(setup.tokenizer, f"{sample.text.strip()}\n\n{question.ask}") for question in sample.questions]
    readings = [_prepare_reading(setup, prompt) for prompt in prompts]

    def measure_aware(recipe: Recipe) -> list[Outcome]:
        triples = zip(readings, prompts, sample.questions, strict=True)
        return [
            outcome
            for compress, prompt, question in triples
            for outcome in asked(setup, compress(recipe), [prompt.question("")], [question])
        ]

    return measure_aware


def _prepare_reading(setup: Setup, prompt: Prompt) -> Callable[[Recipe], CompressedReading]:
    """Reads at once, or, for long texts, in chunks: then once for every variant, which compresses on the way."""
    model, config = setup.model, setup.config
    ids = prompt.text.to(model.device)
    lead = prompt.question(REPEAT).to(model.device)
    looking = Looking.of(model, setup.tokenizer, ids, config.recipe, prompt.lead, prompt.question(""))
    base = config.recipe.settled(ids.shape[1])
    if base.chunk:

        def in_chunks(recipe: Recipe) -> CompressedReading:
            method = get(recipe.method)
            reading = read_in_chunks(model, ids, method, replace(recipe, chunk=base.chunk), lead)
            compress = reading.cache.report().compress_seconds
            seconds = {"read": reading.seconds, "repeat": reading.repeat_cost(method), "compress": compress}
            return CompressedReading(reading.cache, ids, seconds, looking)

        return in_chunks
    reading = read(model, ids, setup.methods, base, lead)

    def at_once(recipe: Recipe) -> CompressedReading:
        method = get(recipe.method)
        cache = compressed(reading.of(method), recipe)
        compress = cache.report().compress_seconds
        seconds = {"read": reading.seconds, "repeat": reading.repeat_cost(method), "compress": compress}
        return CompressedReading(cache, ids, seconds, looking)

    return at_once


def compressed(cache: KeepCache, recipe: Recipe) -> KeepCache:
    """The cache, compressed by a variant's recipe."""
    return cache.compress(recipe.budget, recipe.method, slot_dtype=recipe.slot_dtype)


def prepare_turns(setup: Setup, sample: Sample) -> Measure:
    """Turns are read one by one into a live cache that folds on the way; then each question is the next turn."""
    head, between, after = turn_template(setup.tokenizer)
    joined = "".join(f"{head if i == 0 else between}{user}{after}\0{answer}\1" for i, (user, answer) in enumerate(sample.turns))
    turns = [turn.replace("\0", "") for turn in joined.split("\1")[:-1]]
    turn_ids = [setup.tokens(turn) for turn in turns]

    def measure(recipe: Recipe) -> list[Outcome]:
        start = time.perf_counter()
        ids = torch.cat(turn_ids, 1)
        cache = live(setup, recipe, ids.shape[1])
        for turn in turn_ids:
            cache.read(setup.model, turn)
        if cache.keep_layers[0].tail:
            cache.compress()
        compress = cache.report().compress_seconds
        seconds = {"read": time.perf_counter() - start - compress, "repeat": 0.0, "compress": compress}
        empty = setup.tokens(f"{between}{after}")
        looking = Looking.of(setup.model, setup.tokenizer, ids, recipe, empty=empty)
        reading = CompressedReading(cache, ids, seconds, looking)
        question_ids = [setup.tokens(f"{between}{question.ask}{after}") for question in sample.questions]
        return asked(setup, reading, question_ids, sample.questions)

    return measure


def live(setup: Setup, recipe: Recipe, tokens: int) -> KeepCache:
    """A cache that folds every `period` tokens; a share is that of all the tokens it will have read."""
    limit = Budget.parse(recipe.budget_text)
    if limit.kind == "fraction":
        heads, size = key_shape(setup.model)
        heads *= sum(map(is_compressed, layer_kinds(setup.model)))
        policy = Policy.of(limit, recipe.method, recipe.slot_dtype, recipe.full_dtype)
        slots = limit.total_slots(tokens, heads, policy.price(size, setup.model.dtype.itemsize))
        recipe = replace(recipe, budget=str(max(MIN_SLOTS, slots // heads)))
    return indexed(setup.model, KeepCache.of(setup.model, replace(recipe, chunk=CHUNK, period=setup.config.period)), recipe)


def asked(
    setup: Setup, reading: CompressedReading, question_ids: Sequence[Tensor], questions: Sequence[Question]
) -> list[Outcome]:
    """By choice: the likeliest, per token, of the right and the wrong answers; by answer: what the model writes.

    What comes back for a question, no other one sees: then each is asked by itself.
    """
    placed = [ids.to(setup.model.device) for ids in question_ids]
    if reading.looking is None:
        return _asked(setup, reading, placed, questions)
    outcomes = []
    for ids, question in zip(placed, questions, strict=True):
        enriched, measures = reading.back(ids, question)
        (outcome,) = _asked(setup, enriched, [ids], [question])
        outcomes.append(replace(outcome, cache=reading.cache, measures={**outcome.measures, **measures}))
    return outcomes


def _asked(
    setup: Setup, reading: CompressedReading, question_ids: Sequence[Tensor], questions: Sequence[Question]
) -> list[Outcome]:
    if setup.config.by == "answer":
        return _written(setup, reading, question_ids, questions)
    return [_chosen(setup, reading, ids, question) for ids, question in zip(question_ids, questions, strict=True)]


def _chosen(setup: Setup, reading: CompressedReading, question_ids: Tensor, question: Question) -> Outcome:
    """The likeliest, per token, of the right and the wrong answers."""
    start = time.perf_counter()
    if not question.wrong:
        raise InputError("this task has no wrong answers to choose from: measure what the model writes, with --by answer")
    options = (question.expected, *question.wrong)
    chances = likelihoods(setup, reading.cache, question_ids, options)
    text = options[max(range(len(options)), key=lambda i: chances[i])]
    score = float(chances[0] > max(chances[1:]))
    seconds = {**reading.seconds, "answer": time.perf_counter() - start}
    return Outcome(text, score, reading.cache, reading.ids.shape[1], seconds, chances[0], tuple(chances))


def _written(
    setup: Setup, reading: CompressedReading, question_ids: Sequence[Tensor], questions: Sequence[Question]
) -> list[Outcome]:
    """What the model writes, greedily, to all questions together."""
    start = time.perf_counter()
    expected = [setup.tokens(_lead(setup) + question.expected) for question in questions]
    limit = setup.config.max_new_tokens
    answers = write(setup.model, setup.tokenizer, reading.cache, question_ids, expected, limit)
    seconds = {**reading.seconds, "answer": (time.perf_counter() - start) / max(1, len(questions))}
    return [
        Outcome(
            answer=text,
            score=question.score(text),
            cache=reading.cache,
            tokens=reading.ids.shape[1],
            seconds=seconds,
            loglik=loglik,
            chances=(loglik,),
            measures={name: rule(text) for name, rule in question.more.items()},
        )
        for question, (text, loglik) in zip(questions, answers, strict=True)
    ]


def _lead(setup: Setup) -> str:
    """What stands between a question and its answer."""
    return "" if setup.tokenizer.chat_template else " "


def likelihoods(setup: Setup, cache: KeepCache, question_ids: Tensor, answers: Sequence[str]) -> list[float]:
    """Mean log-probability per token, in nats, of each answer after the question, which is read once."""
    after = cache.fork()
    first = setup.model(question_ids, past_key_values=after, logits_to_keep=1).logits[0]
    means = []
    for text in answers:
        answer = setup.tokens(_lead(setup) + text)
        logits = first
        if answer.shape[1] > 1:
            rest = setup.model(answer[:, :-1], past_key_values=after.fork()).logits[0]
            logits = torch.cat([first, rest])
        log_probs = logits.float().log_softmax(-1)
        means.append(round(float(log_probs.gather(1, answer[0, :, None]).mean()), 6))
    return means


def prepare_continuation(setup: Setup, sample: Sample) -> Measure:
    """Language-model fidelity: the true continuation is fed; the score is the share of equal most likely tokens.

    measures: kl, mean KL(full || compressed) in nats; nll, of a true token in nats. See `fidelity.measure`.
    """
    ids = setup.tokens(sample.text)
    context, future = ids[:, :-CONTINUATION], ids[:, -CONTINUATION:]
    reading = read(setup.model, context, setup.methods, replace(setup.config.recipe, repeat="never"))
    full = memo(lambda: fidelity.log_probs(setup.model, reading.cache.fork().compress("100%"), future))

    def measure(recipe: Recipe) -> list[Outcome]:
        method = get(recipe.method)
        cache = compressed(reading.of(method), recipe)
        start = time.perf_counter()
        ours = fidelity.log_probs(setup.model, cache, future)
        comparison = fidelity.compare(full(), ours, future[0, 1:], cache, reading)
        nll = -float(ours.gather(1, future[0, 1:, None]).mean())
        seconds = {
            "read": reading.seconds,
            "repeat": reading.repeat_cost(method),
            "compress": cache.report().compress_seconds,
            "answer": time.perf_counter() - start,
        }
        measures = {"kl": round(comparison.kl, 6), "nll": round(nll, 6)}
        return [Outcome("", comparison.top1, cache, context.shape[1], seconds, -measures["nll"], measures=measures)]

    return measure
