"""Tiers of memory: what was asked for last is held."""

from __future__ import annotations

import pytest
import torch

from helpers import FOX
from keepkv.documents.document import Recipe
from keepkv.documents.store import Shelf
from keepkv.documents.tiers import Tiers
from keepkv.errors import InputError

TEXT = FOX
RECIPE = Recipe("20%", "snapkv")


def test_tiers_hold_what_was_asked_for_last(shelf: Shelf) -> None:
    keys = [shelf.add(f"{n} {TEXT}", RECIPE)[0].key for n in range(4)]
    size = shelf.get(keys[0]).cache.report().kv_bytes
    with Tiers(shelf, 2.5 * size) as tiers:
        tiers.prefetch(*keys[:2])
        first = tiers.get(keys[0])
        assert tiers.get(keys[0]) is first
        tiers.get(keys[1])
        tiers.get(keys[2])
        assert [tiers.where(key) for key in keys] == ["disk", "device", "device", "disk"]
        assert tiers.bytes("device") <= 2.5 * size
        assert torch.equal(tiers.get(keys[0]).ids, first.ids)
        shelf.store.remove(keys[3])
        with pytest.raises(InputError, match="removed, or never added"):
            tiers.get(keys[3])
