"""H2O: heavy hitters by accumulated attention, and the newest tokens. arXiv 2306.14048."""

from __future__ import annotations

from keepkv import score
from keepkv.methods.base import Method

METHODS = (
    Method(
        name="h2o",
        summary="half newest tokens, half those with most accumulated attention",
        paper="H2O, arXiv 2306.14048",
        score=score.accumulated,
        sinks=0,
        recent=0.5,
        column_mass=True,
        cost="all attention summed once more while reading",
        good="what was said often",
        bad="late tokens: sums favor early ones, which more queries have seen",
    ),
)
