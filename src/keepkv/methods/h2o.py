"""H2O: heavy hitters by accumulated attention, and the newest tokens. arXiv 2306.14048."""

from __future__ import annotations

from keepkv import score
from keepkv.methods.base import Method

METHODS = (
    Method(
        "h2o",
        "half newest tokens, half those with most accumulated attention",
        "H2O, arXiv 2306.14048",
        score.accumulated,
        sinks=0,
        recent=0.5,
        column_mass=True,
        cost="all attention summed once more while reading",
        good="what was said often",
        bad="sums favour early tokens, which more queries have seen",
    ),
)
