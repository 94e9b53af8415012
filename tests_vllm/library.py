"""What the library itself answers, chunk by chunk as an engine asks it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

SETTINGS = {"budget": 128, "window": 64, "step": 128, "references": 128}


def prompt(length: int, seed: int = 1) -> list[int]:
    return torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def library(
    folder: str, ids: list[int], count: int, chunk: int = 256, settings: Any = SETTINGS
) -> tuple[list[int], list[float]]:
    """The same with KeepCache: chunk by chunk, compressed whenever the engine would."""
    from transformers import AutoModelForCausalLM

    from keepkv import KeepCache
    from keepkv.serving.settings import Settings

    rule = Settings(**settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache = KeepCache(
        model, rule.budget, rule.uniform_method(), slot_dtype="float", period=10**6, auto=False, references=rule.references
    )
    todo, tokens, chances = [ids[i : i + chunk] for i in range(0, len(ids), chunk)], [], []
    while len(tokens) < count:
        before = cache.get_seq_length()
        logits = model(torch.tensor([todo[0]]), past_key_values=cache, logits_to_keep=1).logits[0, -1].log_softmax(-1)
        tokens_read = cache.get_seq_length()
        if rule.covered(tokens_read) > rule.covered(before):
            cache.recipe = replace(cache.recipe, tail=tokens_read - rule.covered(tokens_read))
            cache.compress()
        todo.pop(0)
        if not todo:
            tokens.append(int(logits.argmax()))
            chances.append(float(logits.max()))
            todo = [[tokens[-1]]]
    return tokens, chances
