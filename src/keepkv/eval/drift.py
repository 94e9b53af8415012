"""Drift over a long generation: what the full cache wrote is fed to a live cache, and the live cache writes on its own."""

from __future__ import annotations

import time
from functools import cache as memo
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import DynamicCache

from keepkv.cache import KeepCache
from keepkv.eval.measure import Measure, Outcome, Setup, live
from keepkv.eval.sample import Sample
from keepkv.methods import get
from keepkv.recipe import Recipe

STEP = 32  # tokens fed at once
WINDOW = 500  # tokens over which a mean is taken
TEMPERATURE = 0.8


@torch.inference_mode()
def generate(model: Any, ids: Tensor, tokens: int, seed: int = 0, cache: Any = None) -> tuple[Tensor, Tensor]:
    """What a model writes after a prompt, sampled at temperature 0.8.

    Args:
        model: A causal language model of transformers.
        ids: The prompt, int64 [1, n].
        tokens: How many tokens to write.
        seed: Of the sampling.
        cache: The cache to write with; by default transformers' own.

    Returns:
        The ids that were written, [1, tokens], and the log-probabilities at each of them, float16 [tokens, vocabulary].
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    if cache is None:
        cache = DynamicCache(config=model.config)
    words: list[Tensor] = []
    distributions: list[Tensor] = []
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    for _ in range(tokens):
        log_probs = logits[0, -1].float().log_softmax(-1)
        distributions.append(log_probs.half())
        word = torch.multinomial((log_probs / TEMPERATURE).softmax(-1), 1, generator=generator)
        words.append(word)
        logits = model(word[None], past_key_values=cache).logits
    return torch.cat(words)[None], torch.stack(distributions)


@torch.inference_mode()
def follow(model: Any, ids: Tensor, words: Tensor, truth: Tensor, cache: KeepCache) -> tuple[Tensor, Tensor]:
    """How far a live cache is from the full cache along a text that the full cache wrote.

    Args:
        model: A causal language model of transformers.
        ids: The prompt, int64 [1, n].
        words: What the full cache wrote after it, int64 [1, tokens].
        truth: The full cache's log-probabilities, [tokens, vocabulary].
        cache: An empty live cache.

    Returns:
        KL(full || live) in nats for every token, [tokens], and whether the most likely token is the same, bool [tokens].
    """
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[0]
    losses: list[Tensor] = []
    matches: list[Tensor] = []
    for lo in range(0, words.shape[1], STEP):
        chunk_logits = model(words[:, lo : lo + STEP], past_key_values=cache).logits[0]
        ours = torch.cat([logits, chunk_logits[:-1]]).float().log_softmax(-1)
        theirs = truth[lo : lo + len(ours)].float()
        losses.append(kl_div(ours, theirs, reduction="none", log_target=True).sum(-1))
        matches.append(ours.argmax(-1) == theirs.argmax(-1))
        logits = chunk_logits[-1:]
    return torch.cat(losses), torch.cat(matches)


def repetition(tokens: list[int], n: int = 4) -> float:
    """The share of n-grams that have occurred before."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def prepare_drift(setup: Setup, sample: Sample) -> Measure:
    """The score is the share of equal most likely tokens along what the full cache wrote.

    measures: kl, and of each window of 500 tokens kl-500, kl-1000, ...; repetition: the share of 4-grams of its own writing
    that came before.
    """
    model, config = setup.model, setup.config
    ids = setup.tokens(sample.text)
    full = memo(lambda: generate(model, ids, config.written, config.seed))

    def measure(recipe: Recipe) -> list[Outcome]:
        start = time.perf_counter()
        tokens = ids.shape[1] + config.written
        words, truth = full()
        cache = live(setup, recipe, tokens)
        loss, same = follow(model, ids, words, truth, cache)
        if get(recipe.method).keeps_all and recipe.slot_dtype == "float":
            own_words = words
        else:
            own_words, _ = generate(model, ids, config.written, config.seed, live(setup, recipe, tokens))
        measures = {"kl": float(loss.mean()), "repetition": repetition(own_words[0].tolist())}
        measures |= {f"kl-{WINDOW * (i + 1)}": float(part.mean()) for i, part in enumerate(torch.split(loss, WINDOW))}
        compress = cache.report().compress_seconds
        seconds = {"read": 0.0, "repeat": 0.0, "compress": compress, "answer": time.perf_counter() - start - compress}
        text = str(setup.tokenizer.decode(own_words[0, :200], skip_special_tokens=True))
        rounded = {name: round(value, 6) for name, value in measures.items()}
        return [Outcome(text, float(same.float().mean()), cache, ids.shape[1], seconds, measures=rounded)]

    return measure
