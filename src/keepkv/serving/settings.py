"""Settings: what a server keeps of every request, and the rule that scheduler and workers follow without talking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from keepkv import allot, methods
from keepkv.errors import InputError, nearest
from keepkv.methods import Method


@dataclass(frozen=True)
class Settings:
    """budget: slots of every KV head; window: the newest tokens, always exact; step: tokens between two compressions.

    Slots and steps are whole blocks of the engine's. references: queries of a request that each layer remembers for its next
    compression; method, seed: as in KeepCache.
    """

    budget: int = 1024
    method: str = "keepkv"
    window: int = 128
    step: int = 512
    references: int = 256
    seed: int = 0

    @classmethod
    def read(cls, told: object) -> Settings | None:
        """From {"keepkv": {"budget": 1024, ...}}; None where keepkv is not asked for. Raises InputError, MethodError."""
        own = told.get("keepkv") if isinstance(told, Mapping) else None
        if own is None or own is False:
            return None
        if own is True:
            own = {}
        if not isinstance(own, Mapping):
            raise InputError(f'keepkv: expected settings such as {{"budget": 1024}}, not {own!r}')
        known = {name: type(default) for name, default in cls().told()["keepkv"].items()}
        for name, value in own.items():
            if name not in known:
                raise InputError(f"keepkv has no setting {name!r}: {nearest(str(name), list(known))}")
            if type(value) is not known[name] or (name not in ("method", "seed") and value < 1):
                kind = "a name" if known[name] is str else "a positive whole number"
                raise InputError(f"keepkv's {name}: expected {kind}, not {value!r}")
        settings = cls(**own)
        settings.row  # noqa: B018  refuses methods that cannot be served
        return settings

    @property
    def row(self) -> Method:
        """The method's row, with the same slots for every head, since pages have them. Raises MethodError, InputError."""
        row = methods.get(self.method)
        if row.keeps_all:
            raise InputError("full keeps every token: leave keepkv's settings out, and nothing is changed")
        for trouble, reason in (
            (row.repeat is not None and row.repeat.needed, "must see the text repeated, and a server reads it once"),
            (row.layer_pairs is not None, "stores layers together, and an engine's pages are one layer's"),
            (row.needs_projection, "needs the output projections, which an engine's attention does not see"),
        ):
            if trouble:
                raise InputError(f"{row.name} {reason}: choose another method")
        return replace(row, allot=allot.alike, trial=0)

    def check(self, block: int) -> None:
        """Raises InputError unless budget and step are whole blocks of `block` tokens."""
        for name in ("budget", "step"):
            size = getattr(self, name)
            if size % block:
                near = max(block, round(size / block) * block)
                raise InputError(f"keepkv's {name}={size} is not a multiple of the block size {block}: take {near}")

    def covered(self, seen: int) -> int:
        """How many leading tokens the slots stand for when `seen` tokens have been computed; the others are held exactly.

        A pure function: c(s) = step ⌊(s - window) / step⌋ where that is more than the budget, else 0.
        """
        covered = (seen - self.window) // self.step * self.step
        return covered if covered > self.budget else 0

    def peak(self, in_flight: int) -> int:
        """The most tokens' worth of pages that a request holds, with `in_flight` tokens that have not been settled yet."""
        return self.budget + self.window + self.step + in_flight

    def told(self) -> dict[str, Any]:
        """As `read` takes them."""
        return {"keepkv": {field.name: getattr(self, field.name) for field in fields(self)}}
