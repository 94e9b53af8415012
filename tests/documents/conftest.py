from __future__ import annotations

from pathlib import Path

import pytest

from keepkv.documents.store import Shelf, Store


@pytest.fixture
def shelf(model_and_tokenizer, tmp_path: Path) -> Shelf:
    return Store(tmp_path / "store").for_model(*model_and_tokenizer, "tiny")
