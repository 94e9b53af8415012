from __future__ import annotations

from pathlib import Path

import pytest

from helpers import FOX


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A text of some 1,100 tokens in a file."""
    file = tmp_path / "text.txt"
    file.write_text(FOX * 12)
    return str(file)
