"""Hugging Face's own server, `transformers serve`, whose models write into compressed caches.

The server, its API and its scheduling are transformers'; here a model is handed to it that gives `generate` a KeepCache.
"""

from __future__ import annotations

import inspect
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv.cache import KeepCache
from keepkv.cache.report import Report
from keepkv.errors import InputError
from keepkv.recipe import SERVER, Recipe

Told = Callable[
    [int, int, Report, float], None
]  # tokens of the prompt, tokens read now, the cache's report, seconds of reading


CONVERSATIONS = 8  # prompts whose caches are kept for their next turn


class PromptCaches:
    """The compressed caches of the last prompts: a prompt that begins with one of them goes on from its cache."""

    def __init__(self, recipe: Recipe = SERVER, conversations: int = CONVERSATIONS) -> None:
        self.recipe, self.conversations = recipe, conversations
        self._caches: OrderedDict[tuple[int, ...], KeepCache] = OrderedDict()

    def read(self, model: PreTrainedModel, ids: Tensor) -> tuple[KeepCache, int]:
        """A cache that has read all but the last of ids [1, n], and how many of them it had to read for that."""
        told = tuple(ids[0, :-1].tolist())
        known = max((old for old in self._caches if told[: len(old)] == old), key=len, default=())
        if known:
            self._caches.move_to_end(known)
            cache = self._caches[known].fork()
        else:
            cache = KeepCache.of(model, self.recipe.settled(len(told)))
        if len(told) > len(known):
            cache.read(model, ids[:, len(known) : -1])
        if self.conversations and told:
            self._caches[told] = cache.fork()
            while len(self._caches) > self.conversations:
                self._caches.popitem(last=False)
        return cache, len(told) - len(known)


class Compressing:
    """A model for the server: everything is the model's own, but `generate` writes into a compressed cache."""

    def __init__(
        self, model: PreTrainedModel, caches: PromptCaches, told: Told = lambda prompt, read, report, seconds: None
    ) -> None:
        self._model, self._caches, self._told = model, caches, told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @torch.inference_mode()
    def generate(self, **kwargs: Any) -> Any:
        """model.generate, the prompt read and compressed first. Runs in the server's inference thread, one at a time."""
        ids, start = kwargs["input_ids"], time.perf_counter()
        cache, read = self._caches.read(self._model, ids)
        seconds = time.perf_counter() - start
        model: Any = self._model
        answer = model.generate(**kwargs, past_key_values=cache)
        self._told(ids.shape[1], read, cache.report(), seconds)
        return answer


def application(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, caches: PromptCaches, told: Told) -> Any:
    """The server's FastAPI application, for this one model, called `name`. Raises InputError without what it needs."""
    try:
        from transformers.cli.serving import chat_completion, completion, model_manager, response, server, utils
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise InputError("keepkv serve needs a newer transformers: pip install -U transformers") from error
    if not is_serve_available():
        raise InputError("keepkv serve needs a web server: pip install 'keepkv[serve]'")
    served = Compressing(model, caches, told)

    class Manager(model_manager.ModelManager):
        """Has the one model."""

        def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
            return served, tokenizer

        def get_gen_models(self, *args: Any) -> list[dict[str, Any]]:  # type: ignore[override]
            return [{"id": name, "object": "model", "created": int(time.time()), "owned_by": "keepkv"}]

    manager, state = Manager(device=str(model.device), force_model=name), utils.GenerationState()
    parts = {
        "chat_handler": chat_completion.ChatCompletionHandler, "completion_handler": completion.CompletionHandler,
        "response_handler": response.ResponseHandler,
    }  # fmt: skip
    made: dict[str, Any] = {part: kind(model_manager=manager, generation_state=state) for part, kind in parts.items()}
    for part in inspect.signature(server.build_server).parameters:  # handlers of what is not text; they differ by version
        if part.endswith("_handler"):
            made.setdefault(part, None)
    return server.build_server(model_manager=manager, generation_state=state, **made)
