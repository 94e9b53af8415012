"""AdaKV: SnapKV's tokens, the slots of a layer shared among its heads by score. arXiv 2407.11550."""

from __future__ import annotations

from keepkv import allot, score
from keepkv.methods.base import Method

METHODS = (
    Method(
        name="adakv",
        summary="SnapKV's tokens, the slots of a layer shared among its heads by score",
        paper="AdaKV, arXiv 2407.11550",
        score=score.pooled_window,
        allot=allot.within_layers,
        sinks=0,
        cost="32 queries' attention",
        good="models whose heads differ: a head may keep many more tokens than another",
        bad="questions that come after the compression",
    ),
)
