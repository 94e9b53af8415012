"""StreamingLLM: the first tokens and the newest ones. arXiv 2309.17453."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from keepkv import score
from keepkv.merge.merged import Merged
from keepkv.methods.base import Method
from keepkv.ops.rope import rotate
from keepkv.types import Choice, Observation


def closed_up(seen: Observation, choices: Sequence[Choice]) -> list[Merged]:
    """Keys rotated as if what is kept stood without gaps right before what comes next. StreamingLLM, arXiv 2309.17453.

    Key i of n is rotated from where it stood to T - n + i, T tokens read, so that distances are those within the cache.
    What is kept after earlier compressions stands without gaps already.
    """
    made = []
    for h, choice in enumerate(choices):
        stood = choice.kept + seen.tokens - seen.entries
        goal = torch.arange(seen.tokens - len(choice.kept), seen.tokens, device=stood.device)
        keys = rotate(seen.keys[h, choice.kept].float(), goal - stood, seen.inv_freq).to(seen.keys.dtype)
        bias = torch.zeros(len(choice.kept), device=stood.device) if seen.bias is None else seen.bias[h, choice.kept]
        made.append(Merged(keys, seen.values[h, choice.kept], bias))
    return made


METHODS = (
    Method(
        "streaming",
        "the first 4 and the newest tokens, at their own positions",
        "StreamingLLM, arXiv 2309.17453",
        score.recency,
        recent=0,
        cost="nothing",
        good="endless text of which only the newest part matters",
        bad="facts in the middle: they are gone by design",
    ),
    Method(
        "streaming-shifted",
        "the first 4 and the newest tokens, positions re-assigned without gaps",
        "StreamingLLM, arXiv 2309.17453",
        score.recency,
        recent=0,
        merge=closed_up,
        cost="one rotation of the kept keys",
        good="text longer than the model was trained for",
        bad="facts in the middle: they are gone by design",
    ),
)
