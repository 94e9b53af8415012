"""Draws of samples from real prose."""

from __future__ import annotations

import random

from helpers import LOG
from keepkv.eval.sample import Draw, Prose
from keepkv.eval.tasks import haystack

PROSE = Prose(haystack.sentences(str(LOG)), lambda text: len(text.split()))


def draw(number: int = 0, tokens: int = 400, seed: str = "a") -> Draw:
    return Draw(random.Random(seed), PROSE, tokens, number)
