"""What every output has in common: units, colors, and whether figures can be drawn."""

from __future__ import annotations

from importlib.util import find_spec

from keepkv.errors import KeepKVError


def size(count: float) -> str:
    """Bytes in decimal units: 226.8 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"


def require_matplotlib() -> None:
    """Raises KeepKVError where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise KeepKVError(
            "a picture needs matplotlib, which is not installed: pip install 'keepkv[plot]' (--html needs nothing)"
        )


VIRIDIS = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"]


def color(part: float) -> str:
    """Viridis, from 0 to 1."""
    at = min(max(part, 0.0), 1.0) * (len(VIRIDIS) - 1)
    lo, hi = (VIRIDIS[min(int(at) + i, len(VIRIDIS) - 1)] for i in (0, 1))
    mixed = (int(lo[i : i + 2], 16) * (1 - at % 1) + int(hi[i : i + 2], 16) * (at % 1) for i in (0, 2, 4))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)
