"""keepkv serve's gateway: nobody sees another, nobody stops it. Over a real socket, with raw requests."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import FOX

pytest.importorskip("transformers.cli.serving", reason="this transformers' server cannot be given a model")
import httpx2 as httpx
import torch

from keepkv.documents.document import compile_text
from keepkv.models import loading
from keepkv.recipe import Recipe
from keepkv.serving.gateway import Access
from keepkv.serving.limits import Limits, RefusedError
from keepkv.serving.transformers_server import Computed, PromptCaches, application
from keepkv.serving.work import StoppedError, Work
from serving.test_transformers_server import serving

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
RECIPE = Recipe(budget="48", period=64)
LIMITS = Limits(body=60_000, prompt=4000, answer=3000, seconds=30, waiting=3)
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(folder: str):
    return loading.load(folder, "cpu", "auto")


class Server:
    """A server, and what it has computed."""

    def __init__(self, port: int, heard: list[Computed]) -> None:
        self.port = port
        self.heard = heard
        self.url = f"http://127.0.0.1:{port}"

    def post(self, body: object, route: str = CHAT, **headers: str) -> httpx.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(self.url + route, content=data, headers={"content-type": "application/json", **headers}, timeout=60)

    def get(self, route: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + route, headers=headers, timeout=60)

    def said(self, text: str, **more: object) -> str:
        answer = self.post(question(text, **more))
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]


def question(text: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12, **more}


@pytest.fixture(scope="module")
def server(model) -> Iterator[Server]:
    heard: list[Computed] = []
    app = application(*model, "tiny", PromptCaches(RECIPE, 4), heard.append, limits=LIMITS)
    with serving(app) as port:
        yield Server(port, heard)


def test_an_answer_does_not_depend_on_who_was_there_before(server: Server) -> None:
    """Neither what is answered nor what has to be read for it, which takes the time: with what others asked, and without."""
    for number in range(3):
        begun, whole = f"{number} {FOX * 3}", f"{number} {FOX * 3} And who is it that jumps?"
        alone = server.said(whole)
        read = server.heard[-1].read
        server.said(begun)
        server.said(begun, cache_salt="other")
        for mine in ({}, {"cache_salt": "mine"}):
            assert server.said(whole, **mine) == alone
            assert server.heard[-1].read == read == server.heard[-1].prompt - 1
    server.said(whole, cache_salt="mine")
    assert server.heard[-1].read == 0  # one's own


def test_what_is_drawn_does_not_depend_on_anothers_seed(server: Server) -> None:
    drawn = {"temperature": 2.0, "max_tokens": 8, "top_p": 1}
    assert server.said(FOX, seed=5, **drawn) == server.said(FOX, seed=5, **drawn)
    state = torch.get_rng_state()
    server.said("!", seed=5)
    server.said("?")
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"[]", 400), (b"{", 400), (b'{"a": 1, "a": 1}', 400), (b"[" * 50_000, 400), (b"\xff", 400),
        ({}, 400), ({"messages": []}, 400), ({"messages": [1]}, 400), ({"messages": [{"role": "user"}]}, 400),
        ({"messages": "hello"}, 400), (question(""), 400), (question("  "), 400), (question("\ud800"), 400),
        (question("x", max_tokens=0), 400), (question("x", max_tokens=-1), 400), (question("x", max_tokens=10**9), 400),
        (question("x", max_tokens="9"), 400), (question("x", max_tokens=True), 400), (question("x", temperature="hot"), 400),
        (question("x", temperature=-1), 400), (question("x", temperature=1e400), 400), (question("x", top_p=0), 400),
        (question("x", seed=1.5), 400), (question("x", seed=10**30), 400), (question("x", stop=[""]), 400),
        (question("x", stop=3), 400), (question("x", stream="yes"), 400), (question("x", n=2), 400),
        (question("x", logit_bias={"a": 1}), 400), (question("x", logit_bias=[1]), 400), (question("x", tools="x"), 400),
        (question("x", generation_config='{"num_beams": 99}'), 400), (question("x", cache_salt=3), 400),
        (question("x", cache_salt="x" * 300), 400), (question("x", frequency_penalty=-1), 400),
        (question("x", chat_template_kwargs={"chat_template": "{{ 1 }}"}), 400), (question("x", model="other"), 400),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}]}, 400),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, 400),
        (question("x", no_such_field=1), 422), (question("é" * 5000), 400), (question("x" * 70_000), 413),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_and_nothing_is_computed(server: Server, body: object, status: int) -> None:
    before = len(server.heard)
    answer = server.post(body)
    assert answer.status_code == status, answer.text
    if status != 422:
        told = answer.json()
        assert set(told.get("error", told)) & {"message", "detail"}
    assert len(server.heard) == before
    assert "Traceback" not in answer.text


def test_the_other_endpoints_are_checked_too(server: Server) -> None:
    assert server.post({"prompt": FOX, "max_tokens": 3}, "/v1/completions").status_code == 200
    assert server.post({"input": FOX, "max_output_tokens": 3}, "/v1/responses").status_code == 200
    for route, body in (
        ("/v1/completions", {"prompt": ""}), ("/v1/completions", {"prompt": ["a"]}), ("/v1/completions", {}),
        ("/v1/responses", {"input": ""}), ("/v1/responses", {"input": []}),
        ("/v1/responses", {"input": FOX, "max_output_tokens": 0}),
    ):  # fmt: skip
        assert server.post(body, route).status_code == 400
    for route in ("/load_model", "/reset", "/docs", "/v1/audio/transcriptions", "/v1/systemone", "/v1/chat/completions/.."):
        assert server.post({"model": "x"}, route).status_code in (404, 405)
    assert server.get("/reset").status_code == 404
    assert server.get(CHAT).status_code == 405
    assert server.post(question("x"), **{"content-type": "text/plain"}).status_code == 415
    assert server.get("/v1/models").json()["data"][0]["id"] == "tiny"


def test_a_page_in_a_browser_cannot_reach_it_by_another_name(server: Server) -> None:
    for host, status in (
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("localhost:80", 200),
        ("[::1]:80", 200),
        ("10.1.2.3", 200),
    ):
        assert server.get("/health", host=host).status_code == status
    access = Access(hosts=frozenset({"models.home"}))
    access.check_host("Models.home.:8000")
    with pytest.raises(RefusedError):
        access.check_host("")


def test_health_is_told_and_others_are_refused_while_the_model_works(server: Server) -> None:
    """A long answer, two that wait, and one too many; clients that leave make room, and stop what was computed for them."""
    with ThreadPoolExecutor() as pool:
        stop = threading.Event()
        running = [pool.submit(leave_when, stop, server.port, question(FOX, max_tokens=2900)) for _ in range(3)]
        until(lambda: server.get("/health").json()["waiting"] == 3)
        start = time.monotonic()
        assert server.get("/health").status_code == 200
        assert time.monotonic() - start < 2
        refused = server.post(question("x"))
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        computed = len(server.heard)
        stop.set()
        until(lambda: server.get("/health").json()["waiting"] == 0)
        assert [each.result() for each in running] == [None] * 3
        assert len(server.heard) == computed  # none of them was computed to its end
    assert server.said(FOX)


def leave_when(stop: threading.Event, port: int, body: dict[str, object]) -> None:
    """A client that asks, and is gone before it is answered."""
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port)) as client:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        client.sendall(head.encode() + data)
        stop.wait(30)


def until(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_reading_stops_at_a_layer_when_nobody_waits(model) -> None:
    lm, _ = model
    caches, work = PromptCaches(RECIPE, 4), Work("us")
    work.give_up()
    with pytest.raises(StoppedError, match="left"):
        caches.read(lm, torch.arange(3, 203)[None], work)
    late = Work("us", seconds=0)
    late.begin()
    time.sleep(0.01)
    with pytest.raises(StoppedError, match="allowed"):
        caches.read(lm, torch.arange(3, 203)[None], late)
    assert caches.read(lm, torch.arange(3, 203)[None], Work("us"))[1] == 199  # nothing was remembered


def test_an_answer_that_takes_too_long_ends(model) -> None:
    app = application(*model, "tiny", PromptCaches(RECIPE), limits=Limits(seconds=1.5))
    with serving(app) as port:
        answer = Server(port, []).post(question(FOX, max_tokens=8000))
        assert answer.status_code == 200
        assert 0 < answer.json()["usage"]["completion_tokens"] < 8000


def test_keys_are_asked_for_and_tell_clients_apart(model) -> None:
    heard: list[Computed] = []
    app = application(*model, "tiny", PromptCaches(RECIPE, 4), heard.append, Access(("one", "two")))
    with serving(app) as port:
        server = Server(port, heard)
        for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "one two"}):
            for answer in (
                server.post(question("x"), **headers),
                server.get("/metrics", **headers),
                server.get("/v1/models", **headers),
            ):
                assert answer.status_code == 401
        assert server.get("/health").status_code == 200
        for key, read in (("one", False), ("two", False), ("one", True), ("two", True)):
            assert server.post(question(FOX), authorization=f"Bearer {key}").status_code == 200
            assert (heard[-1].read == 0) is read
    assert "two" not in repr(Access(("one", "two")))


def test_metrics_count_and_hold_no_texts(server: Server) -> None:
    server.said("a secret whale")
    text = server.get("/metrics").text
    assert 'keepkv_requests_total{route="/v1/chat/completions",status="200"}' in text
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    assert values["keepkv_written_tokens_total"] >= 12
    assert values["keepkv_requests_here"] == 0
    assert "whale" not in text


def test_documents_are_shared_by_setting(model, tmp_path: Path) -> None:
    document = compile_text(*model, FOX * 3, Recipe("40%", "snapkv"))
    heard: list[Computed] = []
    with serving(application(*model, "tiny", PromptCaches(RECIPE, 4, [document]), heard.append)) as port:
        server = Server(port, heard)
        text = f"{(FOX * 3).strip()}\n\nWho jumps?"
        assert server.said(text) == server.said(text, cache_salt="other")
        assert [each.read < 40 for each in heard] == [True, True]


def test_a_mistake_of_the_servers_own_is_said_without_a_text(model, monkeypatch, capfd) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a secret whale")

    app = application(*model, "tiny", PromptCaches(RECIPE))
    with serving(app) as port:
        server = Server(port, [])
        monkeypatch.setattr(PromptCaches, "read", fails)
        answer = server.post(question("a secret whale"))
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        monkeypatch.undo()
        assert server.said(FOX)
    assert "whale" not in answer.text + "".join(capfd.readouterr())
