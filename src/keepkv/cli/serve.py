"""keepkv serve. Heavy imports happen inside."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from keepkv.cli.options import Budget, Debug, Device, Dtype, Method, Seed, SlotDtype, checked
from keepkv.cli.progress import bar, err
from keepkv.recipe import SERVER

if TYPE_CHECKING:
    from keepkv.cache.report import Report


def serve(
    model: Annotated[str, typer.Argument(help="smollm2 (embedded, no network), a folder, or a Hugging Face id.")] = "smollm2",
    budget: Budget = SERVER.budget_text,
    method: Method = SERVER.method_name,
    slot_dtype: SlotDtype = SERVER.slot_dtype,
    period: Annotated[int, typer.Option(min=1, help="Compress again whenever so many tokens have come.")] = SERVER.period or 0,
    conversations: Annotated[
        int, typer.Option(min=0, help="Prompts whose compressed caches are kept, so that a next turn need not be read whole.")
    ] = 8,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = SERVER.seed,
    debug: Debug = False,
) -> None:
    """Serve a model with compressed caches, over the OpenAI API, with Hugging Face's own server (transformers serve).

    Chat completions, completions and responses, streamed if wanted; one request at a time. Prompts are compressed when they
    have been read, and what comes later every --period tokens. For many requests at once, use the plugin for vLLM.

    [bold]keepkv serve --budget 10%[/bold]

    [bold]curl localhost:8000/v1/chat/completions -H "content-type: application/json" -d '{"model": "smollm2", "messages":
    \\[{"role": "user", "content": "What is a whale?"}]}'[/bold]
    """
    with bar(f"loading {model}"):
        from keepkv.models import loading
        from keepkv.serving.transformers_server import PromptCaches, application

        recipe = checked(replace(SERVER, budget=budget, method=method, slot_dtype=slot_dtype, period=period, seed=seed))
        lm, tokenizer = loading.load(model, device, dtype)
        app = application(lm, tokenizer, model, PromptCaches(recipe, conversations), _told)
    import uvicorn

    config = uvicorn.Config(app, host=host, port=port, log_level="warning")
    bound = config.bind_socket()  # says why and ends if the port is taken
    err.print(f"serving {model} at http://{host}:{port}/v1, {method} {budget}; Ctrl-C ends")
    uvicorn.Server(config).run(sockets=[bound])


def _told(prompt: int, read: int, report: Report, seconds: float) -> None:
    err.print(
        f"[dim]{prompt:,} tokens, {read:,} read in {seconds:.1f} s; cache {report.kv_bytes / 1e6:.1f} MB, "
        f"{report.ratio:.1f} times smaller[/dim]"
    )
