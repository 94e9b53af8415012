"""A process that uses the store at the same time as others."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch

from helpers import FOX
from keepkv.documents.document import Recipe, answer
from keepkv.documents.store import Store
from keepkv.models import loading


def work(folder: str, store: str, seed: int, seconds: float, failed) -> None:
    try:
        torch.set_num_threads(1)
        model, tokenizer = loading.load(folder)
        rng, end = random.Random(seed), time.monotonic() + seconds
        shelf = Store(Path(store)).for_model(model, tokenizer)
        right: dict[int, tuple[int, ...]] = {}
        while time.monotonic() < end:
            n = rng.randrange(6)
            document = shelf.ask_for(f"{n} {FOX}", Recipe("40%", "snapkv"), f"{n}")
            said = answer(model, tokenizer, document, ["Who?"], 3).answers[0].tokens
            assert right.setdefault(n, said) == said
            if rng.random() < 0.2:
                shelf.store.collect(rng.choice((None, 400_000)))
    except BaseException as error:
        failed.put(f"{type(error).__name__}: {error}")
        raise
