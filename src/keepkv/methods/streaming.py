"""StreamingLLM: the first tokens and the newest ones. arXiv 2309.17453."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from keepkv import score
from keepkv.merge.merged import Merged
from keepkv.methods.base import Method
from keepkv.types import Choice, Observation


def closed_up(observation: Observation, choices: Sequence[Choice]) -> list[Merged]:
    """Keys rotated as if what is kept stood without gaps right before what comes next. StreamingLLM, arXiv 2309.17453.

    Key i of n is rotated from where it stood to T - n + i, where T tokens were read, so that distances are those within the
    cache. What is kept after earlier compressions stands without gaps already. `docs/theory.md 1.6`.
    """
    results = []
    for head, choice in enumerate(choices):
        kept = choice.kept
        position = kept + observation.tokens - observation.entries
        goal = torch.arange(observation.tokens - len(kept), observation.tokens, device=position.device)
        keys = observation.rotation.rotate(observation.keys[head, kept].float(), goal - position).to(observation.keys.dtype)
        bias = torch.zeros(len(kept), device=position.device) if observation.bias is None else observation.bias[head, kept]
        results.append(Merged(keys, observation.values[head, kept], bias))
    return results


METHODS = (
    Method(
        name="streaming",
        summary="the first 4 and the newest tokens, at their own positions",
        paper="StreamingLLM, arXiv 2309.17453",
        score=score.recency,
        recent=0,
        cost="nothing",
        good="endless text of which only the newest part matters",
        bad="facts in the middle: they are gone by design",
    ),
    Method(
        name="streaming-shifted",
        summary="the first 4 and the newest tokens, positions re-assigned without gaps",
        paper="StreamingLLM, arXiv 2309.17453",
        score=score.recency,
        recent=0,
        merge=closed_up,
        cost="one rotation of the kept keys",
        good="text longer than the model was trained for",
        bad="facts in the middle: they are gone by design",
    ),
)
