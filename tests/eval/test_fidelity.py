"""Fidelity on the embedded model."""

from __future__ import annotations

from helpers import LOG
from keepkv.eval.fidelity import measure, split_into_segments


def test_the_default_is_far_closer_to_the_full_cache_than_eviction(smollm2) -> None:
    model, tokenizer = smollm2
    stretches = split_into_segments(tokenizer, LOG.read_text(), segments=2, context=1024, continuation=96)
    kl = {r.method: r.kl for r in measure(model, stretches, 96, ["keepkv", "snapkv", "h2o", "expected"], ["10%"])}
    assert kl["keepkv"] < 0.5 * min(kl["snapkv"], kl["h2o"], kl["expected"])
