"""AdaKV: a layer's budget shared among its heads by score. arXiv 2407.11550."""

from __future__ import annotations

from keepkv import allot, score
from keepkv.methods.base import Method

METHODS = (
    Method(
        "adakv",
        "SnapKV's tokens, a layer's slots shared among its heads by score",
        "AdaKV, arXiv 2407.11550",
        score.pooled_window,
        allot.within_layers,
        sinks=0,
        cost="32 queries' attention",
        good="heads that differ: the ragged slots are stored as such",
        bad="questions that come after the compression",
    ),
)
