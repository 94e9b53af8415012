"""PyramidInfer: what the newest fifth of the queries attends to, with a schedule of layers. arXiv 2405.12532."""

from __future__ import annotations

from torch import Tensor

from keepkv import allot
from keepkv.methods.base import Method
from keepkv.score import rising_window
from keepkv.types import Observation


def newest_fifth(observation: Observation) -> Tensor:
    """Mean over all heads of the shares of the newest fifth of the queries, with weights from 1 to 1.2.

    There is one score for all heads, so that they keep the same tokens. In the paper, tokens are dropped while the prompt is
    read, so that later layers never see them; here only the cache shrinks. PyramidInfer, arXiv 2405.12532.
    """
    count = int((observation.query_positions >= 0.8 * observation.tokens).sum())
    return rising_window(observation, max(1, count)).mean((0, 1)).expand(observation.heads, -1)


METHODS = (
    Method(
        name="pyramidinfer",
        summary="what the newest fifth of queries attends to, layers on a cosine",
        paper="PyramidInfer, arXiv 2405.12532",
        score=newest_fifth,
        allot=allot.cosine_layers,
        recent=0,
        same_tokens_in_all_heads=True,
        cost="a fifth of the queries' attention again",
        good="its schedule of layers, which KeepKV borrows",
        bad="heads that differ, as all keep the same tokens; it computes no less here",
    ),
)
