"""TOVA: what the newest query attends to. arXiv 2401.06104."""

from __future__ import annotations

from torch import Tensor

from keepkv.methods.base import Method
from keepkv.observe.references import window_shares
from keepkv.types import Observation


def last_query(observation: Observation) -> Tensor:
    """The share that the newest query gives to each token, mean over all heads of the layer. TOVA, arXiv 2401.06104.

    There is one score for all heads, so that they keep the same tokens.
    """
    share = window_shares(observation, 1).mean((0, 1, 2))
    return share.expand(observation.heads, -1)


METHODS = (
    Method(
        name="tova",
        summary="what the newest query attends to, the same tokens in all heads",
        paper="TOVA, arXiv 2401.06104",
        score=last_query,
        sinks=0,
        recent=1,
        same_tokens_in_all_heads=True,
        cost="one query's attention",
        good="decoding (period=1), where every step corrects the last",
        bad="prompts: one query says little about the next question",
    ),
)
