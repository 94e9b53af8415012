"""A compressed cache, dissected."""

from __future__ import annotations

import torch

from helpers import make_model, tokens
from keepkv import KeepCache
from keepkv.inspection import anatomy
from keepkv.inspection.anatomy import Anatomy

LENGTH = 200
NASTY = "<script>alert('&amp;')</script> \"quoted\" http://example.org/x "


def dissect(family: str = "llama", method: str = "keepkv", pieces: list[str] | None = None) -> tuple[KeepCache, Anatomy]:
    cache = KeepCache(make_model(family, torch.float32), 0.1, method)
    make_model(family, torch.float32)(tokens(1, LENGTH), past_key_values=cache)
    return cache, anatomy.of(cache, pieces or [NASTY[i % len(NASTY)] for i in range(LENGTH)], "tiny")
