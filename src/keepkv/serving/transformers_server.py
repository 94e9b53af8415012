"""Hugging Face's own server, `transformers serve`, with compressed caches.

The server, its API and its scheduling are transformers' own. Here it is given a model whose `generate` uses a KeepCache.
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

# Called after every request: tokens of the prompt, tokens that had to be read, the cache's report, seconds of reading.
RequestCallback = Callable[[int, int, Report, float], None]

CONVERSATIONS = 8  # prompts whose caches are kept for their next turn


class PromptCaches:
    """The compressed caches of the last prompts: a prompt that begins with one of them continues from its cache.

    Args:
        recipe: How prompts are compressed.
        conversations: How many caches are kept.
    """

    def __init__(self, recipe: Recipe = SERVER, conversations: int = CONVERSATIONS) -> None:
        recipe.refuse("a server", "keep", "tolerance", "exact", "lookback", *(["repeat"] if recipe.repeat == "always" else []))
        self.recipe = recipe
        self.conversations = conversations
        self._caches: OrderedDict[tuple[int, ...], KeepCache] = OrderedDict()

    def read(self, model: PreTrainedModel, ids: Tensor) -> tuple[KeepCache, int]:
        """A cache that has read all but the last of ids [1, n], and how many of them it had to read for that."""
        prompt = tuple(ids[0, :-1].tolist())
        prefix = max((old for old in self._caches if prompt[: len(old)] == old), key=len, default=())
        if prefix:
            self._caches.move_to_end(prefix)
            cache = self._caches[prefix].fork()
        else:
            cache = KeepCache.of(model, self.recipe.settled(len(prompt)))
        if len(prompt) > len(prefix):
            cache.read(model, ids[:, len(prefix) : -1])
        if self.conversations and prompt:
            self._caches[prompt] = cache.fork()
            while len(self._caches) > self.conversations:
                self._caches.popitem(last=False)
        return cache, len(prompt) - len(prefix)


def _ignore(prompt: int, read: int, report: Report, seconds: float) -> None:
    pass


class CompressingModel:
    """A model for the server: everything is the model's own, but `generate` uses a compressed cache.

    Args:
        model: The model.
        caches: Where the caches of prompts are kept.
        on_request: Called after every request.
    """

    def __init__(self, model: PreTrainedModel, caches: PromptCaches, on_request: RequestCallback = _ignore) -> None:
        self._model = model
        self._caches = caches
        self._on_request = on_request

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @torch.inference_mode()
    def generate(self, **kwargs: Any) -> Any:
        """model.generate, after the prompt was read and compressed. Runs in the server's inference thread, one at a time."""
        ids = kwargs["input_ids"]
        start = time.perf_counter()
        cache, tokens_read = self._caches.read(self._model, ids)
        seconds = time.perf_counter() - start
        model: Any = self._model
        output = model.generate(**kwargs, past_key_values=cache)
        self._on_request(ids.shape[1], tokens_read, cache.report(), seconds)
        return output


def application(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    caches: PromptCaches,
    on_request: RequestCallback = _ignore,
) -> Any:
    """The server's FastAPI application.

    Args:
        model: The one model that is served.
        tokenizer: Its tokenizer.
        name: What clients call it.
        caches: Where the caches of prompts are kept.
        on_request: Called after every request.

    Raises:
        InputError: if transformers is too old, or its server's packages are missing.
    """
    try:
        from transformers.cli.serving import chat_completion, completion, model_manager, response, server, utils
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise InputError("keepkv serve needs a newer transformers: pip install -U transformers") from error
    if not is_serve_available():
        raise InputError("keepkv serve needs a web server: pip install 'keepkv[serve]'")
    served = CompressingModel(model, caches, on_request)

    class Manager(model_manager.ModelManager):
        """Has this one model."""

        def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
            return served, tokenizer

        def get_gen_models(self, *args: Any) -> list[dict[str, Any]]:  # type: ignore[override]
            return [{"id": name, "object": "model", "created": int(time.time()), "owned_by": "keepkv"}]

    manager = Manager(device=str(model.device), force_model=name)
    state = utils.GenerationState()
    handlers: dict[str, Any] = {
        "chat_handler": chat_completion.ChatCompletionHandler(model_manager=manager, generation_state=state),
        "completion_handler": completion.CompletionHandler(model_manager=manager, generation_state=state),
        "response_handler": response.ResponseHandler(model_manager=manager, generation_state=state),
    }
    for parameter in inspect.signature(server.build_server).parameters:
        if parameter.endswith("_handler"):
            handlers.setdefault(parameter, None)  # of what is not text; they differ between versions
    return server.build_server(model_manager=manager, generation_state=state, **handlers)
