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
from keepkv.eval.measure import Host, Opened, Outcome, live
from keepkv.eval.sample import Sample
from keepkv.methods import Method

STEP = 32  # tokens fed at once
WINDOW = 500  # tokens over which a mean is taken
TEMPERATURE = 0.8


@torch.inference_mode()
def write(model: Any, ids: Tensor, tokens: int, seed: int = 0, cache: Any = None) -> tuple[Tensor, Tensor]:
    """What a cache (default: transformers' own) writes after ids, [1, tokens], sampled, and its log-probabilities,
    [tokens, vocabulary] float16."""
    chance = torch.Generator(device=model.device).manual_seed(seed)
    cache, written, found = DynamicCache(config=model.config) if cache is None else cache, [], []
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    for _ in range(tokens):
        chances = logits[0, -1].float().log_softmax(-1)
        found.append(chances.half())
        written.append(torch.multinomial((chances / TEMPERATURE).softmax(-1), 1, generator=chance))
        logits = model(written[-1][None], past_key_values=cache).logits
    return torch.cat(written)[None], torch.stack(found)


@torch.inference_mode()
def follow(model: Any, ids: Tensor, written: Tensor, truth: Tensor, cache: KeepCache) -> tuple[Tensor, Tensor]:
    """KL(full || ours) in nats for every token that was written, [tokens], and whether the most likely one is the same."""
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[0]
    loss, same = [], []
    for lo in range(0, written.shape[1], STEP):
        made = model(written[:, lo : lo + STEP], past_key_values=cache).logits[0]
        ours = torch.cat([logits, made[:-1]]).float().log_softmax(-1)
        right = truth[lo : lo + len(ours)].float()
        loss.append(kl_div(ours, right, reduction="none", log_target=True).sum(-1))
        same.append(ours.argmax(-1) == right.argmax(-1))
        logits = made[-1:]
    return torch.cat(loss), torch.cat(same)


def repetition(tokens: list[int], n: int = 4) -> float:
    """The share of n-grams that have occurred before."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def drifted(host: Host, sample: Sample) -> Opened:
    """The score is the share of equal most likely tokens along what the full cache wrote.

    measures: kl, and of each window of 500 tokens kl-500, kl-1000, ...; repetition: the share of 4-grams of its own writing
    that came before.
    """
    model, config, ids = host.model, host.config, host.tokens(sample.text)
    full = memo(lambda: write(model, ids, config.written, config.seed))

    def opened(method: Method, budget: str) -> list[Outcome]:
        start, tokens = time.perf_counter(), ids.shape[1] + config.written
        written, truth = full()
        cache = live(host, method, budget, tokens)
        loss, same = follow(model, ids, written, truth, cache)
        own = (
            written
            if method.keeps_all
            else write(model, ids, config.written, config.seed, live(host, method, budget, tokens))[0]
        )
        measures = {"kl": float(loss.mean()), "repetition": repetition(own[0].tolist())}
        measures |= {f"kl-{WINDOW * (i + 1)}": float(part.mean()) for i, part in enumerate(torch.split(loss, WINDOW))}
        compress = cache.report().compress_seconds
        seconds = {"read": 0.0, "repeat": 0.0, "compress": compress, "answer": time.perf_counter() - start - compress}
        text = str(host.tokenizer.decode(own[0, :200], skip_special_tokens=True))
        rounded = {name: round(value, 6) for name, value in measures.items()}
        return [Outcome(text, float(same.float().mean()), cache, ids.shape[1], seconds, measures=rounded)]

    return opened
