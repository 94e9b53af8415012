"""SnapKV: what the last queries of the prompt attend to. arXiv 2404.14469.

A file to copy for a method of your own. `base.py` explains every field of a Method, and `registry.py` lists the files. A
function that only your method uses belongs into your file: its docstring gives the equation, and is shown on the method's page.
"""

from __future__ import annotations

from keepkv import score
from keepkv.methods.base import Method

METHODS = (
    Method(
        name="snapkv",
        summary="what the last 32 queries attend to, pooled over neighbors",
        paper="SnapKV, arXiv 2404.14469",
        score=score.pooled_window,  # it gives the newest 32 tokens +inf, so that they stay
        sinks=0,
        cost="32 queries' attention",
        good="a question that stands at the end of the prompt",
        bad="questions that come after the compression",
    ),
)
