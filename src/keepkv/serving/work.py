"""Work: what the model computes for one request, and how it is stopped."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from keepkv.cache import KeepCache
from keepkv.cache.policy import Policy
from keepkv.compress import Progress


class StoppedError(Exception):
    """The work was stopped: nobody waits for it any more, or it took too long."""


class Work:
    """One request's computation, in a thread of its own.

    Attributes:
        scope: Whose caches it may go on from, and leave its own to. None: nobody's.
        seed: Of what is drawn by chance; None: any.
        begun, done: Set by the thread that computes.
    """

    def __init__(self, scope: str | None = None, seed: int | None = None, seconds: float = float("inf")) -> None:
        self.scope = scope
        self.seed = seed
        self.begun = False
        self.done = threading.Event()
        self._seconds = seconds
        self._given_up = threading.Event()
        self._end = float("inf")

    def begin(self) -> None:
        """Called when the computation begins: the time that it may take counts from here."""
        self.begun = True
        self._end = time.monotonic() + self._seconds

    def give_up(self) -> None:
        """Called when nobody waits for it any more. The computation ends at the next layer or token."""
        self._given_up.set()

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._given_up.is_set()

    @property
    def late(self) -> bool:
        """Whether it has taken all the time that it may take."""
        return time.monotonic() > self._end

    def check(self) -> None:
        """Raises StoppedError if there is no reason to go on."""
        if self.given_up:
            raise StoppedError("the client has left")
        if self.late:
            raise StoppedError(f"the prompt took more than the {self._seconds:,.0f} seconds that are allowed: shorten it")


class WatchedCache(KeepCache):
    """A cache whose reading and compressing can be stopped, at every layer. It is torn then, and must not be used any more."""

    work: Work | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As `KeepCache.update`. Raises StoppedError."""
        if self.work is not None:
            self.work.check()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _compress(self, policy: Policy, progress: Progress, exact: bool = False) -> None:
        def checked(done: int, of: int) -> None:
            if self.work is not None:
                self.work.check()
            progress(done, of)

        super()._compress(policy, checked, exact)


class EndOfWork(StoppingCriteria):
    """Ends an answer when its time is over: what is written by then is the answer. Raises StoppedError if nobody waits."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self._work.given_up:
            raise StoppedError("the client has left")
        return torch.full((len(input_ids),), self._work.late, dtype=torch.bool, device=input_ids.device)
