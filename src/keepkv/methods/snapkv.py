"""SnapKV: what the last queries of the prompt attend to. arXiv 2404.14469."""

from __future__ import annotations

from keepkv import score
from keepkv.methods.base import Method

METHODS = (
    Method(
        "snapkv",
        "what the last 32 queries attend to, pooled over neighbours",
        "SnapKV, arXiv 2404.14469",
        score.pooled_window,
        sinks=0,
        cost="32 queries' attention",
        good="a question that stands at the end of the prompt",
        bad="questions that come after the compression",
    ),
)
