"""Hugging Face's own server, `transformers serve`, with compressed caches.

The server and its API are transformers' own. Here it is given a model whose `generate` uses a KeepCache, and a gateway
(gateway.py) that clients talk to.
"""

from __future__ import annotations

import inspect
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv.cache import KeepCache
from keepkv.cache.report import Report
from keepkv.documents.document import Document
from keepkv.errors import InputError
from keepkv.recipe import SERVER, Recipe
from keepkv.serving.gateway import Access, Gateway
from keepkv.serving.limits import Limits
from keepkv.serving.metrics import Metrics
from keepkv.serving.work import EndOfWork, WatchedCache, Work


class Computed(NamedTuple):
    """A request that was computed.

    Attributes:
        prompt: Tokens of its prompt.
        read: Those of them that had to be read.
        written: Tokens of the answer.
        report: The cache's.
        reading_seconds, seconds: Of reading, and of everything.
    """

    prompt: int
    read: int
    written: int
    report: Report
    reading_seconds: float
    seconds: float


RequestCallback = Callable[[Computed], None]

CONVERSATIONS = 8  # prompts whose caches are kept for their next turn


class PromptCaches:
    """The compressed caches of the last prompts: a prompt that begins with one of them continues from its cache.

    Only prompts of one scope, that is one client, see each other. So an answer does not depend on what others have asked, and
    neither does the time that it takes. What a document is of may be known to everybody, and is shared.

    Args:
        recipe: How prompts are compressed.
        conversations: How many caches are kept.
        documents: A prompt that begins with one of their texts continues from it, whoever asks.
    """

    def __init__(self, recipe: Recipe = SERVER, conversations: int = CONVERSATIONS, documents: Sequence[Document] = ()) -> None:
        recipe.refuse("a server", "keep", "tolerance", "exact", "lookback", *(["repeat"] if recipe.repeat == "always" else []))
        self.recipe = recipe
        self.conversations = conversations
        self._caches: OrderedDict[tuple[str, tuple[int, ...]], KeepCache] = OrderedDict()
        self._documents = {tuple(each.ids[0].tolist()): each for each in documents if each.ids is not None}

    def read(self, model: PreTrainedModel, ids: Tensor, work: Work | None = None) -> tuple[KeepCache, int]:
        """A cache that has read all but the last of ids [1, n], and how many of them it had to read for that.

        Args:
            model: The model.
            ids: The prompt.
            work: Whose it is, and when to stop; None: nobody's, and never.

        Raises:
            StoppedError: if the work is given up, or takes too long. Nothing is remembered then.
        """
        work = work or Work()
        prompt = tuple(ids[0, :-1].tolist())
        cache, known = self._begun(model, prompt, work)
        if len(prompt) > known:
            cache.read(model, ids[:, known:-1])
        if isinstance(cache, WatchedCache):
            cache.work = None  # what is written can be stopped after every token
        if self.conversations and prompt and work.scope is not None:
            self._caches[work.scope, prompt] = cache.fork()
            self._caches.move_to_end((work.scope, prompt))
            while len(self._caches) > self.conversations:
                self._caches.popitem(last=False)
        return cache, len(prompt) - known

    def _begun(self, model: PreTrainedModel, prompt: tuple[int, ...], work: Work) -> tuple[KeepCache, int]:
        """A cache that has read a beginning of the prompt, and how many tokens those are."""
        own = [old for scope, old in self._caches if scope == work.scope and prompt[: len(old)] == old]
        shared = [text for text in self._documents if prompt[: len(text)] == text]
        prefix = max((*own, *shared), key=len, default=())
        cache: KeepCache
        if prefix and prefix in own:
            place = str(work.scope), prefix
            self._caches.move_to_end(place)
            cache = self._caches[place].fork()
        elif prefix:
            return self._documents[prefix].cache.fork(), len(prefix)
        else:
            cache = WatchedCache.of(model, self.recipe.settled(len(prompt)))
        if isinstance(cache, WatchedCache):
            cache.work = work
        return cache, len(prefix)


def _ignore(computed: Computed) -> None:
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
        self.work = Work()  # whose turn it is

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @torch.inference_mode()
    def generate(self, **kwargs: Any) -> Any:
        """model.generate, after the prompt was read and compressed. Runs in the server's inference thread, one at a time.

        Raises:
            StoppedError: if `work` is given up, or takes too long to read the prompt.
        """
        work = self.work
        work.begin()
        try:
            return self._generate(work, **kwargs)
        finally:
            work.done.set()

    def _generate(self, work: Work, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"]
        start = time.perf_counter()
        cache, tokens_read = self._caches.read(self._model, ids, work)
        reading = time.perf_counter() - start
        if work.seed is None:
            torch.seed()  # what others have asked for decides nothing
        else:
            torch.manual_seed(work.seed)
        model: Any = self._model
        output = model.generate(**kwargs, past_key_values=cache, stopping_criteria=[EndOfWork(work)])
        written = output.shape[1] - ids.shape[1]
        self._on_request(Computed(ids.shape[1], tokens_read, written, cache.report(), reading, time.perf_counter() - start))
        return output


def application(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    caches: PromptCaches,
    on_request: RequestCallback = _ignore,
    access: Access | None = None,
    limits: Limits | None = None,
) -> Gateway:
    """The server's ASGI application.

    Args:
        model: The one model that is served.
        tokenizer: Its tokenizer.
        name: What clients call it.
        caches: Where the caches of prompts are kept.
        on_request: Called after every request that was computed to its end.
        access: Who may ask.
        limits: What may be asked.

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
    metrics = Metrics()

    def counted(computed: Computed) -> None:
        sizes = computed.prompt, computed.read, computed.written
        metrics.computed(*sizes, computed.seconds, computed.report.kv_bytes)
        on_request(computed)

    served = CompressingModel(model, caches, counted)

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
    inner = server.build_server(model_manager=manager, generation_state=state, **handlers)

    def assign(work: Work) -> None:
        served.work = work

    return Gateway(inner, tokenizer, assign, access, limits, metrics)
