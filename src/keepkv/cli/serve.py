"""`keepkv serve`: the OpenAI API over compressed caches. Heavy imports happen inside."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from keepkv.cli.options import (
    COMPRESSION,
    Budget,
    Debug,
    Device,
    Dtype,
    Method,
    Seed,
    SlotDtype,
    argument,
    checked,
    option,
)
from keepkv.cli.progress import bar, err
from keepkv.recipe import SERVER
from keepkv.serving.limits import Limits

if TYPE_CHECKING:
    from keepkv.serving.transformers_server import Computed

SERVER_PANEL = "Server"
LIMITS_PANEL = "Limits"
LIMITS = Limits()


def serve(
    model: Annotated[
        str, argument('"smollm2" (the default: embedded, no network), a model folder, or a Hugging Face id.', "MODEL")
    ] = "smollm2",
    budget: Budget = SERVER.budget_text,
    method: Method = SERVER.method_name,
    slot_dtype: SlotDtype = SERVER.slot_dtype,
    period: Annotated[
        int, option("Compress again whenever this many tokens have come.", "TOKENS", COMPRESSION, min=1)
    ] = SERVER.period or 0,
    conversations: Annotated[
        int,
        option(
            "How many compressed caches to keep for later requests of the same client, which is told by its API key or by "
            "cache_salt: a request that continues one of them reads only what is new.",
            "N",
            SERVER_PANEL,
            min=0,
        ),
    ] = 8,
    host: Annotated[str, option("Address to listen on.", "ADDRESS", SERVER_PANEL)] = "localhost",
    port: Annotated[int, option("Port to listen on.", "PORT", SERVER_PANEL, min=1, max=65535)] = 8000,
    document: Annotated[
        list[Path] | None,
        option(
            "A compiled document: prompts that begin with its text continue from it, whoever asks. May be given several times.",
            "FILE",
            SERVER_PANEL,
            show_default=False,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        option(
            "A name by which clients may call the server, beside localhost and IP addresses. May be given several times.",
            "NAME",
            SERVER_PANEL,
            show_default=False,
        ),
    ] = None,
    max_body: Annotated[int, option("Bytes of a request, at most.", "BYTES", LIMITS_PANEL, min=1)] = LIMITS.body,
    max_prompt: Annotated[int, option("Tokens of a prompt, at most.", "TOKENS", LIMITS_PANEL, min=1)] = LIMITS.prompt,
    max_answer: Annotated[int, option("Tokens of an answer, at most.", "TOKENS", LIMITS_PANEL, min=1)] = LIMITS.answer,
    max_seconds: Annotated[
        float, option("Seconds of computing for a request, at most.", "SECONDS", LIMITS_PANEL, min=1)
    ] = LIMITS.seconds,
    max_waiting: Annotated[
        int, option("Requests at once, at most. More are refused, and told when to come again.", "N", LIMITS_PANEL, min=1)
    ] = LIMITS.waiting,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = SERVER.seed,
    debug: Debug = False,
) -> None:
    r"""Serve a model with compressed caches over the OpenAI API.

    The server is Hugging Face's own (transformers serve), and answers one request at a time. A prompt is compressed when it has
    been read, and what follows every --period tokens. For many requests at once, use the plugin for vLLM.

    Clients must give an API key if the environment variable KEEPKV_API_KEY holds one, or several separated by commas.

    $ keepkv serve --budget 10%
    $ keepkv serve Qwen/Qwen3-0.6B --port 8080
    $ curl localhost:8000/v1/chat/completions -H "content-type: application/json" \
          -d '{"model": "smollm2", "messages": [{"role": "user", "content": "What is a whale?"}]}'
    """
    with bar(f"loading {model}"):
        from keepkv.documents.document import load
        from keepkv.models import loading
        from keepkv.serving.gateway import Access
        from keepkv.serving.transformers_server import PromptCaches, application

        keys = tuple(filter(None, (key.strip() for key in os.environ.get("KEEPKV_API_KEY", "").split(","))))
        access = Access(keys, frozenset(name.lower() for name in (host, *(allow_host or ()))))
        limits = Limits(max_body, max_prompt, max_answer, max_seconds, max_waiting)
        recipe = checked(replace(SERVER, budget=budget, method=method, slot_dtype=slot_dtype, period=period, seed=seed))
        lm, tokenizer = loading.load(model, device, dtype)
        caches = PromptCaches(recipe, conversations, [load(file, lm, tokenizer) for file in document or ()])
        app = application(lm, tokenizer, model, caches, _log, access, limits)
    import uvicorn

    config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=5, limit_concurrency=512)
    bound_socket = config.bind_socket()  # says why and ends if the port is taken
    err.print(f"serving {model} at http://{host}:{port}/v1 with {method} at {budget}. Press Ctrl-C to stop.", markup=False)
    uvicorn.Server(config).run(sockets=[bound_socket])


def _log(computed: Computed) -> None:
    """Numbers, and nothing of what was asked or answered."""
    err.print(
        f"[dim]{computed.prompt:,} tokens in the prompt, {computed.read:,} of them read in {computed.reading_seconds:.1f} s, "
        f"{computed.written:,} written. Cache: {computed.report.kv_bytes / 1e6:.1f} MB, {computed.report.ratio:.1f} times "
        "smaller[/dim]"
    )
