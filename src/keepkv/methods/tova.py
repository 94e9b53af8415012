"""TOVA: what the newest query attends to. arXiv 2401.06104."""

from __future__ import annotations

from torch import Tensor

from keepkv import allot
from keepkv.methods.base import Method
from keepkv.observe.references import window_logits
from keepkv.types import Observation


def last_query(observation: Observation) -> Tensor:
    """The share that the newest query gives to each token, mean over all heads of the layer. TOVA, arXiv 2401.06104.

    One score for all heads: they keep the same tokens.
    """
    share = window_logits(observation, 1).softmax(-1).mean((0, 1, 2))
    return share.expand(observation.heads, -1)


METHODS = (
    Method(
        "tova",
        "what the newest query attends to, the same tokens in all heads",
        "TOVA, arXiv 2401.06104",
        last_query,
        allot.together(allot.uniform),
        sinks=0,
        recent=1,
        cost="one query's attention",
        good="decoding (period=1), where every step corrects the last",
        bad="one query says little about the next question",
    ),
)
