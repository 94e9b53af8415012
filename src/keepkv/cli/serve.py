"""`keepkv serve`: the OpenAI API over compressed caches. Heavy imports happen inside."""

from __future__ import annotations

from dataclasses import replace
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

if TYPE_CHECKING:
    from keepkv.cache.report import Report

SERVER_PANEL = "Server"


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
            "How many compressed caches to keep for later requests: a request that continues one of them reads only what is "
            "new.",
            "N",
            SERVER_PANEL,
            min=0,
        ),
    ] = 8,
    host: Annotated[str, option("Address to listen on.", "ADDRESS", SERVER_PANEL)] = "localhost",
    port: Annotated[int, option("Port to listen on.", "PORT", SERVER_PANEL, min=1, max=65535)] = 8000,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = SERVER.seed,
    debug: Debug = False,
) -> None:
    r"""Serve a model with compressed caches over the OpenAI API.

    The server is Hugging Face's own (transformers serve), and answers one request at a time. A prompt is compressed when it has
    been read, and what follows every --period tokens. For many requests at once, use the plugin for vLLM.

    $ keepkv serve --budget 10%
    $ keepkv serve Qwen/Qwen3-0.6B --port 8080
    $ curl localhost:8000/v1/chat/completions -H "content-type: application/json" \
          -d '{"model": "smollm2", "messages": [{"role": "user", "content": "What is a whale?"}]}'
    """
    with bar(f"loading {model}"):
        from keepkv.models import loading
        from keepkv.serving.transformers_server import PromptCaches, application

        recipe = checked(replace(SERVER, budget=budget, method=method, slot_dtype=slot_dtype, period=period, seed=seed))
        lm, tokenizer = loading.load(model, device, dtype)
        app = application(lm, tokenizer, model, PromptCaches(recipe, conversations), _log)
    import uvicorn

    config = uvicorn.Config(app, host=host, port=port, log_level="warning")
    bound_socket = config.bind_socket()  # says why and ends if the port is taken
    err.print(f"serving {model} at http://{host}:{port}/v1 with {method} at {budget}. Press Ctrl-C to stop.", markup=False)
    uvicorn.Server(config).run(sockets=[bound_socket])


def _log(prompt: int, read: int, report: Report, seconds: float) -> None:
    err.print(
        f"[dim]{prompt:,} tokens in the prompt, {read:,} of them read in {seconds:.1f} s. Cache: "
        f"{report.kv_bytes / 1e6:.1f} MB, {report.ratio:.1f} times smaller[/dim]"
    )
