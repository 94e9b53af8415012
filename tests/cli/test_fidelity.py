"""`keepkv fidelity`: records, a table, and a method of one's own."""

from __future__ import annotations

import json

from helpers import ROOT, run
from keepkv import methods
from keepkv.methods import registry


def test_fidelity_records(monkeypatch, capsys, folder: str, text: str) -> None:
    args = ["fidelity", text, "--model", folder, "--methods", "keepkv,full,h2o", "--budgets", "5%,15%", "--json"]
    sizes = ["--segments", "2", "--context-tokens", "300", "--continuation-tokens", "40"]
    status, out, err = run(monkeypatch, capsys, *args, *sizes)
    assert (status, err) == (0, "")
    records = {(r["method"], r["budget"]): r for r in json.loads(out)}
    assert len(records) == 6
    wanted = {"method", "budget", "delta_nll", "kl", "top1", "kv_bytes", "kv_bytes_full", "compress_seconds", "prefill_seconds"}
    assert all(wanted <= record.keys() for record in records.values())
    full = records["full", "5%"]
    assert (full["delta_nll"], full["kl"], full["top1"]) == (0.0, 0.0, 1.0)
    assert 0 < records["keepkv", "15%"]["kl"] < records["keepkv", "5%"]["kl"]
    assert records["keepkv", "15%"]["kv_bytes"] < 0.18 * full["kv_bytes_full"]


def test_tables_for_people(monkeypatch, capsys, folder: str, text: str) -> None:
    args = ["fidelity", text, "--model", folder, "--methods", "streaming", "--segments", "1", "--context-tokens", "64"]
    assert "top-1" in run(monkeypatch, capsys, *args, "--continuation-tokens", "8")[1]
    assert "AAAI" in run(monkeypatch, capsys, "methods")[1] or "2504.09936" in run(monkeypatch, capsys, "methods")[1]
    names = [row["name"] for row in json.loads(run(monkeypatch, capsys, "methods", "--json")[1])]
    assert names[0] == "full"
    assert names[-1] == "keepkv"


def test_a_method_from_a_file_is_measured_beside_the_table(monkeypatch, capsys, folder: str, text: str) -> None:
    own = ROOT / "examples" / "own_method.py"
    args = ["fidelity", text, "--model", folder, "--methods", f"{own}:LOUD,snapkv", "--budgets", "25%", "--segments", "1"]
    monkeypatch.setattr(registry, "METHODS", dict(methods.METHODS))  # the file registers its row
    status, out, _ = run(monkeypatch, capsys, *args, "--context-tokens", "120", "--continuation-tokens", "16", "--json")
    assert status == 0
    assert [row["method"] for row in json.loads(out)] == ["loud", "snapkv"]
    status, _, said = run(monkeypatch, capsys, "fidelity", text, "--methods", f"{own}:LOUD,{own}:QUIET")
    assert status == 2
    assert "QUIET" in said
