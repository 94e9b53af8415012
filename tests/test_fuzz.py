"""Every parser reads what it is given, or says in one of keepkv's errors why not: some of benchmarks/fuzz.py, and the corpus.

`make nightly` draws millions of other inputs. What has found something lies in tests/corpus, a folder for each parser.
"""

from __future__ import annotations

import importlib.util
import random
import signal
import sys
from pathlib import Path

import pytest

from helpers import ROOT

CORPUS = ROOT / "tests" / "corpus"
COUNTS = {
    "keep": 200,
    "bytes": 150,
    "index": 60,
    "conversation": 150,
    "records": 150,
    "config": 200,
    "budget": 400,
    "regex": 80,
}

spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "fuzz.py")
assert spec is not None
assert spec.loader is not None
fuzz = importlib.util.module_from_spec(spec)
sys.modules["fuzz"] = fuzz
spec.loader.exec_module(fuzz)


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    monkeypatch.setattr("keepkv.text.prompt._PATIENCE", 0.5)
    before = signal.signal(signal.SIGALRM, fuzz._late)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", COUNTS)
def test_whatever_is_read_is_read_or_refused(name: str, tmp_path: Path) -> None:
    target = fuzz.TARGETS[name](tmp_path)
    kept = sorted((CORPUS / name).glob("*")) if (CORPUS / name).is_dir() else []
    inputs = [(file.name, file.read_bytes()) for file in kept]
    inputs += [(str(number), target.make(random.Random(f"tests {name} {number}"))) for number in range(COUNTS[name])]
    outcomes = {which: fuzz.outcome(target, data) for which, data in inputs}
    assert {which: what for which, what in outcomes.items() if what.startswith("FAILED")} == {}
    assert "refused" in outcomes.values() or name == "index"
    assert "read" in outcomes.values()


def test_what_goes_wrong_is_found(tmp_path: Path) -> None:
    class Wrong(fuzz.Target):
        def read(self, data: bytes) -> None:
            {}["x"]

    assert fuzz.outcome(Wrong(tmp_path), b"").startswith("FAILED KeyError")
