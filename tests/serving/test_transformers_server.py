"""keepkv serve: transformers' own server with compressed caches, over a real socket, asked by the official client."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from helpers import FOX, run

pytest.importorskip("transformers.cli.serving", reason="this transformers' server cannot be given a model")
import httpx2 as httpx
import uvicorn
from openai import BadRequestError, OpenAI

from keepkv import KeepCache
from keepkv.models import loading
from keepkv.recipe import Recipe
from keepkv.serving.limits import Limits
from keepkv.serving.transformers_server import CompressingModel, Computed, PromptCaches, application
from keepkv.serving.work import Work

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
TEXT = FOX * 4
RECIPE = Recipe(budget="64", period=128)
SALTED = {"extra_body": {"cache_salt": "ours"}}


@pytest.fixture(scope="module")
def model(folder: str):
    return loading.load(folder, "cpu", "auto")


@pytest.fixture(scope="module")
def served(model):
    """A client, and what the server said of every request."""
    heard: list[Computed] = []
    limits = Limits(body=100_000, prompt=3000, answer=4000, seconds=60, waiting=3)
    app = application(*model, "tiny", PromptCaches(RECIPE, 2), heard.append, limits=limits)
    with serving(app) as port, httpx.Client(trust_env=False) as plain:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", http_client=plain, max_retries=0)
        yield client, heard


@contextmanager
def serving(app: object) -> Iterator[int]:
    """The port of a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(10)


def said(model, messages: list[dict[str, str]], count: int) -> str:
    """The library's own answer."""
    lm, tokenizer = model
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    cache = KeepCache.of(lm, RECIPE)
    cache.read(lm, ids[:, :-1])
    out = lm.generate(ids, past_key_values=cache, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def told(heard: list, before: int) -> tuple:
    """What the server said of the last request; a streamed answer may be here before that."""
    until = time.monotonic() + 20
    while len(heard) == before and time.monotonic() < until:
        time.sleep(0.01)
    return heard[-1]


def test_an_answer_is_the_librarys_own_streamed_or_not(model, served) -> None:
    client, heard = served
    messages = [{"role": "user", "content": TEXT + "Who jumps?"}]
    expected = said(model, messages, 12)
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0, **SALTED)
    assert whole.choices[0].message.content == expected
    prompt, read, _, report, *_ = told(heard, 0)
    assert prompt == whole.usage.prompt_tokens
    assert read == prompt - 1
    assert report.slots_per_head == 64
    assert report.kv_bytes < report.kv_bytes_full / 2
    before = len(heard)
    parts = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0, stream=True, **SALTED)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == expected
    assert told(heard, before)[1] == 0  # the same prompt again: nothing is read


def test_the_next_turn_is_all_that_is_read(model, served) -> None:
    client, heard = served
    messages = [{"role": "user", "content": TEXT + "Which dog?"}]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0, **SALTED)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "Why?"}]
    before = len(heard)
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0, **SALTED)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert told(heard, before)[1] == second.usage.prompt_tokens - first.usage.prompt_tokens


def test_models_are_listed_and_others_refused(served) -> None:
    client, _ = served
    assert [found.id for found in client.models.list()] == ["tiny"]
    with pytest.raises(BadRequestError):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "?"}], max_tokens=2)


def test_a_stream_that_is_given_up_leaves_the_server_answering(model, served) -> None:
    client, _ = served
    messages = [{"role": "user", "content": TEXT}]
    with client.chat.completions.create(model="tiny", messages=messages, max_tokens=2000, stream=True) as stream:
        next(iter(stream))
    again = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, temperature=0)
    assert again.choices[0].message.content == said(model, messages, 4)


def test_a_shelf_keeps_the_last_prompts_and_branches_do_not_touch_them(model) -> None:
    lm, _ = model
    shelf, ids, work = PromptCaches(RECIPE, 2), torch.arange(3, 203)[None], Work("us")
    cache, read = shelf.read(lm, ids, work)
    assert read == 199
    assert cache.get_seq_length() == 199
    lm(ids[:, -1:], past_key_values=cache)
    longer = torch.cat([ids, torch.arange(3, 43)[None]], 1)
    branch, read = shelf.read(lm, longer, work)
    assert read == 40
    fresh = KeepCache.of(lm, RECIPE).read(lm, ids[:, :-1]).read(lm, longer[:, 199:-1])
    ours, theirs = (lm(longer[:, -1:], past_key_values=one).logits for one in (branch, fresh))
    assert torch.equal(ours, theirs)
    shelf.read(lm, torch.arange(60, 160)[None], work)  # two are kept: the first prompt's goes
    assert shelf.read(lm, ids, work)[1] == 199


def test_only_generate_is_not_the_models_own(model) -> None:
    lm, _ = model
    stand_in = CompressingModel(lm, PromptCaches(RECIPE, 2))
    assert stand_in.config is lm.config
    assert stand_in.device == lm.device


def test_serve_says_what_is_wrong_at_once(monkeypatch, capsys) -> None:
    for args, says in ((["nowhere"], "unknown model"), (["--budget", "ten"], "ten"), (["--method", "nobody"], "nobody")):
        status, _, err = run(monkeypatch, capsys, "serve", *args)
        assert status == 2
        assert says in err
