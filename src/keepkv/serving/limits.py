"""Limits: what a request to `keepkv serve` may cost, and how it is refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one request may cost, and how many may wait.

    Attributes:
        body: Bytes of a request.
        prompt: Tokens of a prompt.
        answer: Tokens of an answer.
        seconds: Of computing for one request. An answer ends there; a prompt that takes longer to read is given up.
        waiting: Requests that are computed or wait. One more is refused with status 503.
    """

    body: int = 2 << 20
    prompt: int = 65_536
    answer: int = 8_192
    seconds: float = 600.0
    waiting: int = 32


class RefusedError(Exception):
    """A request that is not answered.

    Attributes:
        status: The HTTP status.
        message: What was wrong, what was expected, what to do. It holds no text of the client's.
        retry: Seconds after which it may be tried again; None: it would be refused again.
    """

    def __init__(self, status: int, message: str, retry: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry = retry
