"""KVzip: what a repetition of the text asks for. arXiv 2505.23416."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from keepkv import allot
from keepkv.methods.base import Method
from keepkv.observe.repetition import WHOLE
from keepkv.types import Observation


def asked_again(observation: Observation) -> Tensor:
    """The largest share that a token got, over the group and all queries of a repetition of the text. KVzip, arXiv 2505.23416.

    Each piece of the text is repeated over the full cache, and shares are counted among the first 4 tokens, the piece and its
    repetition (`observe.repetition.Repeat`). What came later and was not repeated scores 0.
    """
    assert observation.repeat_peak is not None, "the method table has the text repeated"
    return observation.repeat_peak


METHODS = (
    Method(
        name="kvzip",
        summary="what a repetition of the text asks for, over all layers and heads",
        paper="KVzip, arXiv 2505.23416",
        score=asked_again,
        allot=partial(allot.everywhere, floor=0.0),
        recent=0,
        repeat=WHOLE,
        cost="reading the text again over its full cache: two to three times the reading",
        good="verbatim details, whatever is asked later",
        bad="aggregates (counting, summing up): no mass is kept",
    ),
)
