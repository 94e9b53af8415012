"""MiniCache: neighboring layers share the directions of their slots. arXiv 2405.14366."""

from __future__ import annotations

from keepkv import allot, score
from keepkv.methods.base import Method
from keepkv.slots.layer_pairs import LayerPairs

METHODS = (
    Method(
        name="minicache",
        summary="SnapKV's tokens, neighboring layers of the upper half sharing their directions",
        paper="MiniCache, arXiv 2405.14366",
        score=score.pooled_window,
        allot=allot.alike,
        sinks=0,
        layer_pairs=LayerPairs(),
        cost="one pass over the kept keys and values, which are restored at every step",
        good="about a third more tokens for the same bytes",
        bad="layers that do not resemble each other",
    ),
)
