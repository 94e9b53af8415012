"""The default: keys in place, votes and values fitted on future queries, one budget for the whole model."""

from __future__ import annotations

from functools import partial

from keepkv import allot, choose, score
from keepkv.merge import fit
from keepkv.merge.per_head import fitted
from keepkv.methods.base import Method
from keepkv.observe import references
from keepkv.observe.repetition import Repeat

METHODS = (
    Method(
        name="keepkv",
        summary="keys in place, votes and values fitted on future queries, global budgets (default)",
        paper="KeepKV, arXiv 2504.09936; Attention Matching, arXiv 2602.16284",
        score=score.output_change,
        allot=allot.everywhere,
        recent=0,
        choose=choose.eliminate,
        merge=fitted(fit.fit),
        midway=fitted(partial(fit.fit, trust=0.1)),
        references=references.context,
        repeat=Repeat(),
        judged=True,
        trials=(32, 128),
        cost="about one reading at 10%, one more for the repetition",
        good="the closest to the full cache at any budget",
        bad="time on a CPU; random strings at very small budgets",
    ),
)
