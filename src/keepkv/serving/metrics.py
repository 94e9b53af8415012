"""Metrics: what `keepkv serve` counts, in Prometheus' text format. No texts, no keys, no addresses."""

from __future__ import annotations

import threading
from collections import Counter


class Metrics:
    """Counts requests and what they cost. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = Counter[tuple[str, int]]()
        self._failures = Counter[str]()
        self._sums = Counter[str]()

    def count(self, route: str, status: int) -> None:
        """A request was answered, or refused."""
        with self._lock:
            self._requests[route, status] += 1

    def failed(self, kind: str) -> None:
        """An error of the server's own."""
        with self._lock:
            self._failures[kind] += 1

    def computed(self, prompt: int, read: int, written: int, seconds: float, kv_bytes: int) -> None:
        """A request was computed: tokens of its prompt, tokens of that which were read, tokens written, and what it took."""
        sums = {"prompt_tokens": prompt, "read_tokens": read, "written_tokens": written, "compute_seconds": seconds}
        with self._lock:
            self._sums.update(sums)
            self._sums["cache_bytes"] = kv_bytes

    def text(self, here: int) -> str:
        """Everything, as Prometheus reads it; here: requests that are computed or wait."""
        with self._lock:
            lines = ["# TYPE keepkv_requests_total counter"]
            lines += [f'keepkv_requests_total{{route="{r}",status="{s}"}} {n}' for (r, s), n in sorted(self._requests.items())]
            lines += ["# TYPE keepkv_failures_total counter"]
            lines += [f'keepkv_failures_total{{kind="{kind}"}} {n}' for kind, n in sorted(self._failures.items())]
            for name in ("prompt_tokens", "read_tokens", "written_tokens", "compute_seconds"):
                lines += [f"# TYPE keepkv_{name}_total counter", f"keepkv_{name}_total {self._sums[name]:g}"]
            lines += ["# TYPE keepkv_cache_bytes gauge", f"keepkv_cache_bytes {self._sums['cache_bytes']}"]
            lines += ["# TYPE keepkv_requests_here gauge", f"keepkv_requests_here {here}"]
        return "\n".join(lines) + "\n"
