"""Gateway: what stands between the clients of `keepkv serve` and transformers' server.

It knows who may ask (host, API key), checks and bounds what is asked (requests.py), lets one request after the other have the
model, stops the computation for a client that has left, and counts. It is a plain ASGI application around another one, and logs
no texts.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from time import perf_counter
from typing import Any

from transformers import PreTrainedTokenizerBase

from keepkv.serving.limits import Limits, RefusedError
from keepkv.serving.metrics import Metrics
from keepkv.serving.requests import ROUTES, Asked, asked
from keepkv.serving.work import Work

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_DRAINED = 64 << 20  # bytes of a request that is too large, which are read and forgotten
_SLOW_BODY = 30.0  # seconds in which a request must have come
_OWN_MISTAKE = "the server failed to answer: this is its own mistake, and others are answered"
_ERRORS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        keys: API keys. None at all: whoever reaches the port.
        hosts: Names by which the server may be called, in small letters, beside localhost and IP addresses. A page in a browser
            cannot reach it by a name of its own.
    """

    keys: tuple[str, ...] = field(default=(), repr=False)
    hosts: frozenset[str] = frozenset()

    def check_host(self, host: str) -> None:
        """Raises RefusedError unless this is one of the server's names."""
        name = (host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]).lower().rstrip(".")
        with suppress(ValueError):
            ipaddress.ip_address(name.strip("[]"))
            return
        if name != "localhost" and name not in self.hosts:
            raise RefusedError(
                403, "this server is not known by that name: call it by its address, or start it with --allow-host NAME"
            )

    def key(self, authorization: str) -> str:
        """The API key of a request, "" where none is needed. Raises RefusedError for one that is not known."""
        if not self.keys:
            return ""
        given = authorization.removeprefix("Bearer ").strip().encode()
        found = [key for key in self.keys if hmac.compare_digest(key.encode(), given)]
        if not found:
            raise RefusedError(401, "the API key is missing or wrong: give it as Authorization: Bearer KEY")
        return found[0]


class Gateway:
    """The application that clients talk to.

    Args:
        inner: transformers' server.
        tokenizer: The model's, to count tokens.
        assign: Called with each request's work right before `inner` is asked: the model computes for that from now on.
        access: Who may ask.
        limits: What may be asked.
        metrics: What is counted.
    """

    def __init__(
        self,
        inner: Application,
        tokenizer: PreTrainedTokenizerBase,
        assign: Callable[[Work], None],
        access: Access | None = None,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._inner = inner
        self._tokenizer = tokenizer
        self._assign = assign
        self._access = access or Access()
        self._limits = limits or Limits()
        self.metrics = metrics or Metrics()
        self._turn = asyncio.Lock()
        self._here = 0  # requests that are computed or wait
        self._seconds: deque[float] = deque([10.0], maxlen=16)  # of the last computations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(send)
        try:
            await self._answered(scope, receive, answer)
        except RefusedError as refused:
            await answer.refuse(refused)
        except Exception as error:
            self.metrics.failed(type(error).__name__)
            await answer.refuse(RefusedError(500, _OWN_MISTAKE))
        finally:
            self.metrics.count(scope["path"] if scope["path"] in _PATHS else "other", answer.status)

    async def _answered(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """Answers a request. Raises RefusedError."""
        headers = _headers(scope)
        self._access.check_host(headers.get("host", ""))
        route, method = scope["path"], scope["method"]
        if (method, route) == ("GET", "/health"):
            return await answer.text(json.dumps({"status": "ok", "waiting": self._here}), "application/json")
        key = self._access.key(headers.get("authorization", ""))
        if (method, route) == ("GET", "/metrics"):
            return await answer.text(self.metrics.text(self._here), "text/plain; version=0.0.4")
        if (method, route) == ("GET", "/v1/models"):
            return await self._inner(scope, receive, answer.send)
        if route not in ROUTES:
            raise RefusedError(404, f"there is no such endpoint: expected one of {', '.join(ROUTES)}")
        if method != "POST":
            raise RefusedError(405, "expected POST")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedError(415, "expected the header content-type: application/json")
        self._check_room()
        raw = await self._body(headers, receive)
        request = await asyncio.to_thread(asked, route, raw, self._tokenizer, self._limits)
        self._check_room()
        self._here += 1
        try:
            await self._computed(scope, receive, answer, request, _scope_of(key, request.salt))
        finally:
            self._here -= 1
        return None

    def _check_room(self) -> None:
        """Raises RefusedError if too many are waiting already."""
        if self._here >= self._limits.waiting:
            seconds = max(1, round(fmean(self._seconds) * self._here))
            raise RefusedError(503, f"{self._here} requests are waiting, as many as may: try again later", min(600, seconds))

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        """The whole body. Raises RefusedError for one that is too large or does not come."""
        too_large = RefusedError(413, f"the request has more than the {self._limits.body:,} bytes that are allowed: shorten it")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > _DRAINED:
            raise too_large
        try:
            return await asyncio.wait_for(_read(receive, self._limits.body, too_large), _SLOW_BODY)
        except asyncio.TimeoutError:
            raise RefusedError(408, f"the request did not come within {_SLOW_BODY:.0f} seconds") from None

    async def _computed(self, scope: Scope, receive: Receive, answer: _Answer, request: Asked, whose: str | None) -> None:
        """Waits for the turn, and has the request answered by the server within, as long as the client is there."""
        work = Work(whose, request.seed, self._limits.seconds)
        leaving = asyncio.create_task(_watch(receive, work, answer))
        try:
            if not await self._has_turn(leaving):
                return
            start = perf_counter()
            try:
                self._assign(work)
                await self._inner(*_as_json(scope, request), answer.send)
                if answer.failed:
                    raise RefusedError(500, _OWN_MISTAKE)
            except Exception as error:
                raise _refusal(error, work) from error
            finally:
                if work.begun:  # the thread may still compute: nobody else has the model before it has ended
                    work.give_up()
                    await asyncio.to_thread(work.done.wait)
                    self._seconds.append(perf_counter() - start)
                self._turn.release()
        finally:
            work.give_up()
            leaving.cancel()

    async def _has_turn(self, leaving: asyncio.Task[None]) -> bool:
        """Waits until it is this request's turn. False: the client left before."""
        turn = asyncio.create_task(self._turn.acquire())
        try:
            await asyncio.wait({turn, leaving}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self._drop(turn)
            raise
        if not leaving.done():
            return True
        await self._drop(turn)
        return False

    async def _drop(self, turn: asyncio.Task[Any]) -> None:
        """Gives up a turn that was taken or is waited for."""
        turn.cancel()
        with suppress(asyncio.CancelledError):
            await turn
        if not turn.cancelled():
            self._turn.release()


_PATHS = (*ROUTES, "/health", "/metrics", "/v1/models")


class _Answer:
    """What is sent to one client; nothing any more once it has left.

    Attributes:
        status: Of the answer; 499 where the client left before there was one.
        left: Whether the client has left.
        failed: Whether the server within wanted to say that it has failed. That is said in another way.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._ended = False
        self.status = 499
        self.left = False
        self.failed = False

    async def send(self, message: Message) -> None:
        """Sends a message of the server within."""
        if message["type"] == "http.response.start":
            self.failed = message["status"] >= 500
        if not self.failed:
            await self._sent(message)

    async def _sent(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        if not self.left:
            with suppress(OSError):
                await self._send(message)

    async def text(self, text: str, kind: str, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Sends a whole answer."""
        body = text.encode()
        start = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode()), *headers]
        await self._sent({"type": "http.response.start", "status": status, "headers": start})
        await self._sent({"type": "http.response.body", "body": body})

    async def refuse(self, refused: RefusedError) -> None:
        """Says why there is no answer, as OpenAI's API does; where an answer has begun, it ends."""
        if self.status != 499:
            return None if self._ended else await self._sent({"type": "http.response.body", "body": b""})
        kind = _ERRORS.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")
        body = {"error": {"message": refused.message, "type": kind, "param": None, "code": refused.status}}
        headers = [(b"retry-after", str(refused.retry).encode())] if refused.retry is not None else []
        await self.text(json.dumps(body), "application/json", refused.status, headers)
        return None


async def _read(receive: Receive, most: int, too_large: RefusedError) -> bytes:
    """A body. Raises RefusedError."""
    body = bytearray()
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise RefusedError(400, "the request broke off")
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
        if size > _DRAINED:
            raise too_large
        if size <= most:
            body += message.get("body", b"")
        else:  # most clients listen only when they have sent everything
            body.clear()
    if size > most:
        raise too_large
    return bytes(body)


async def _watch(receive: Receive, work: Work, answer: _Answer) -> None:
    """Ends, and the work with it, when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.left = True
    work.give_up()


def _refusal(error: Exception, work: Work) -> RefusedError:
    """What to say of an error that the server within has raised."""
    if isinstance(error, RefusedError):
        return error
    if work.late:
        return RefusedError(503, "this request took longer than is allowed: shorten it")
    if not work.begun:  # nothing was computed: what was asked for cannot be shown to the model
        return RefusedError(
            400, f"this request cannot be shown to the model ({type(error).__name__}): roles may have to alternate"
        )
    return RefusedError(500, _OWN_MISTAKE)


def _as_json(scope: Scope, request: Asked) -> tuple[Scope, Receive]:
    """The request as the server within gets it."""
    body = json.dumps(request.body).encode()
    kept = [(name, value) for name, value in scope["headers"] if name in (b"host", b"x-request-id")]
    headers = [*kept, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        message = next(messages, None)
        if message is None:
            await asyncio.Event().wait()  # whether the client leaves is watched here, and not there
        return message or {}

    return {**scope, "headers": headers}, receive


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _scope_of(key: str, salt: str) -> str | None:
    """Whose caches a request may use: those of the same API key and the same salt. Without either, nobody's."""
    return hashlib.sha256(json.dumps([key, salt]).encode()).hexdigest() if key or salt else None
