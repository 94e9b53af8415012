"""Any sequence of operations on a cache, drawn by Hypothesis, against a plain model of what must hold.

The model of a cache is the tokens of its rows. A cache that keeps everything must give the logits of the model over them,
whatever was read, written, taken back, forked, selected or interrupted in between. One that compresses must have read as many,
hold slots at the right positions, in no more memory than it says, and answer with numbers.
"""

from __future__ import annotations

import os
from typing import ClassVar

import pytest
import torch

pytest.importorskip("hypothesis", reason="property-based tests need hypothesis")
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers import EVERYTHING, make_model, stored
from keepkv import KeepCache, KeepKVError

MODEL = make_model(num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
TOKENS = st.lists(st.integers(3, 96), min_size=1, max_size=12)
EXAMPLES = int(os.environ.get("KEEPKV_EXAMPLES", "6"))  # `make nightly` draws more
QUICK = settings(max_examples=EXAMPLES, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck))


class Caches(RuleBasedStateMachine):
    """A cache, the tokens that it has read, and forks with theirs. `settings` are the cache's."""

    options: ClassVar[dict[str, object]] = {}
    exact = True

    @initialize(ids=st.lists(st.integers(3, 96), min_size=24, max_size=40))
    def begin(self, ids: list[int]) -> None:
        self.cache = KeepCache(MODEL, **self.options)
        self.rows = [ids]
        self.forks: list[tuple[KeepCache, list[list[int]]]] = []
        self.cache.read(MODEL, torch.tensor([ids]))

    @rule(ids=TOKENS)
    def read(self, ids: list[int]) -> None:
        self.cache.read(MODEL, torch.tensor([ids] * len(self.rows)))
        self.rows = [row + ids for row in self.rows]

    @rule(ids=TOKENS)
    def step(self, ids: list[int]) -> None:
        for token in ids[:3]:
            self._pass(torch.tensor([[token]] * len(self.rows)))

    def _pass(self, ids: torch.Tensor) -> torch.Tensor:
        logits = MODEL(ids, past_key_values=self.cache).logits
        self.rows = [row + new for row, new in zip(self.rows, ids.tolist(), strict=True)]
        return logits

    @rule(calls=st.integers(0, 2), ids=st.lists(st.integers(3, 96), min_size=20, max_size=30))
    def interrupted(self, calls: int, ids: list[int]) -> None:
        left = [calls]

        def progress(done: int, of: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        try:
            self.cache.read(MODEL, torch.tensor([ids] * len(self.rows)), progress=progress)
        except KeyboardInterrupt:
            return
        self.rows = [row + ids for row in self.rows]

    @rule(count=st.integers(1, 6))
    def crop(self, count: int) -> None:
        if count <= self.cache.keep_layers[0].tail:
            self.cache.crop(-count)
            self.rows = [row[:-count] for row in self.rows]
        else:
            with pytest.raises(KeepKVError):
                self.cache.crop(-count)

    @rule()
    def fork(self) -> None:
        self.forks = [*self.forks[-1:], (self.cache.fork(), list(self.rows))]

    @precondition(lambda self: self.forks)
    @rule()
    def go_back(self) -> None:
        self.cache, self.rows = self.forks.pop()

    @precondition(lambda self: len(self.rows) < 3)
    @rule()
    def repeat_rows(self) -> None:
        self.cache.batch_repeat_interleave(2)
        self.rows = [row for row in self.rows for _ in range(2)]

    @precondition(lambda self: len(self.rows) > 1)
    @rule(which=st.integers(0, 5))
    def select_row(self, which: int) -> None:
        row = which % len(self.rows)
        self.cache.batch_select_indices(torch.tensor([row]))
        self.rows = [self.rows[row]]

    @precondition(lambda self: self.cache.live)
    @rule(budget=st.sampled_from([12, 16, "60%"]))
    def compress(self, budget: int | str) -> None:
        self.cache.compress(budget if not self.exact else None)

    @invariant()
    def it_has_read_what_it_has_read(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert {layer.get_seq_length() for layer in self.cache.layers} == {len(self.rows[0])}
        report = self.cache.report()
        assert stored(self.cache) <= report.kv_bytes + report.watch_bytes + 4096
        for layer in self.cache.keep_layers:
            if layer.slots is not None:
                for lo, hi in zip(layer.slots.offsets, layer.slots.offsets[1:], strict=False):
                    positions = layer.slots.positions[lo:hi].tolist()
                    assert positions == sorted(positions)
                    assert not positions or 0 <= positions[0] <= positions[-1] < len(self.rows[0]) - layer.tail
                assert bool(layer.slots.bias.isfinite().all())

    @invariant()
    def it_answers(self) -> None:
        if not hasattr(self, "cache"):
            return
        question = torch.tensor([[5, 6]] * len(self.rows))
        logits = MODEL(question, past_key_values=self.cache.fork()).logits
        assert bool(logits.isfinite().all())
        if self.exact:
            whole = MODEL(torch.cat([torch.tensor(self.rows, dtype=torch.int64), question], 1)).logits[:, -2:]
            torch.testing.assert_close(logits, whole, rtol=1e-7, atol=1e-7)


class Exact(Caches):
    options: ClassVar[dict[str, object]] = {"budget": "100%", "method": "full"}


class ExactFolds(Caches):
    options: ClassVar[dict[str, object]] = {
        "budget": "100%",
        "method": EVERYTHING,
        "period": 8,
        "slot_dtype": "float",
        "tail": 3,
    }


class Compressed(Caches):
    options: ClassVar[dict[str, object]] = {"budget": 12, "method": "snapkv", "period": 8, "tail": 2}
    exact = False


class Chunked(Caches):
    options: ClassVar[dict[str, object]] = {"budget": "40%", "method": "keepkv", "chunk": 16}
    exact = False


for machine in (Exact, ExactFolds, Compressed, Chunked):
    machine.TestCase.settings = QUICK
TestExact, TestExactFolds = Exact.TestCase, ExactFolds.TestCase
TestCompressed, TestChunked = Compressed.TestCase, Chunked.TestCase
