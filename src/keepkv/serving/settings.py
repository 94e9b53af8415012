"""Settings: what a server keeps of every request, and the rule that scheduler and workers follow without talking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from keepkv import allot
from keepkv.errors import InputError, nearest
from keepkv.methods import Method, get
from keepkv.recipe import SERVER


@dataclass(frozen=True)
class Settings:
    """What a paged server keeps of every request.

    Args:
        budget: Slots of every KV head; whole blocks of the engine.
        method: A name from the table of methods.
        window: The newest tokens, which are always kept exactly.
        step: Tokens between two compressions; whole blocks of the engine.
        references: Queries of a request that each layer remembers for its next compression.
        seed: Of all that is drawn by chance.

    Example:
        >>> Settings.read({"keepkv": {"budget": 512}})
        Settings(budget=512, method='keepkv', window=128, step=512, references=256, seed=0)
    """

    budget: int = 1024
    method: str = SERVER.method_name
    window: int = 128
    step: int = 512
    references: int = 256
    seed: int = SERVER.seed

    @classmethod
    def read(cls, config: object) -> Settings | None:
        """Reads the additional configuration of an engine.

        Args:
            config: A mapping such as {"keepkv": {"budget": 1024}}; {"keepkv": true} takes the defaults.

        Returns:
            The settings; None where keepkv is not asked for.

        Raises:
            InputError: for an unknown setting, a value out of range, or a method that cannot be served.
            MethodError: for an unknown method.
        """
        values = config.get("keepkv") if isinstance(config, Mapping) else None
        if values is None or values is False:
            return None
        if values is True:
            values = {}
        if not isinstance(values, Mapping):
            raise InputError(f'keepkv: expected true or settings such as {{"budget": 1024}}, not {values!r}')
        types = {name: type(default) for name, default in cls().to_dict()["keepkv"].items()}
        for name, value in values.items():
            if name not in types:
                raise InputError(f"keepkv has no setting {name!r}: {nearest(str(name), list(types))}")
            if type(value) is not types[name] or (name not in ("method", "seed") and value < 1):
                expected = "the name of a method" if name == "method" else "a positive whole number"
                raise InputError(f"keepkv's {name} is {value!r}: expected {expected}")
        settings = cls(**values)
        settings.uniform_method()  # refuses methods that cannot be served
        return settings

    def uniform_method(self) -> Method:
        """The method, with as many slots for every head, because an engine's pages have the same size for every head.

        Raises:
            MethodError: for an unknown method.
            InputError: for a method that cannot be served.
        """
        method = get(self.method)
        if method.keeps_all:
            raise InputError("the method full keeps every token: remove keepkv's settings instead")
        for refused, reason in (
            (method.repeat is not None and method.repeat.needed, "needs the text repeated, and a server reads it once"),
            (method.layer_pairs is not None, "stores layers together, and an engine's pages belong to one layer"),
            (method.needs_projection, "needs the output projections, which an engine's attention does not see"),
        ):
            if refused:
                raise InputError(f"keepkv cannot serve the method {method.name}: it {reason}. Choose another method")
        return replace(method, allot=allot.alike, trials=())

    def check_blocks(self, block: int) -> None:
        """Raises InputError unless budget and step are whole blocks of `block` tokens."""
        for name in ("budget", "step"):
            tokens = getattr(self, name)
            if tokens % block:
                nearest_multiple = max(block, round(tokens / block) * block)
                raise InputError(
                    f"keepkv's {name}={tokens} is not a multiple of the block size {block}: take {nearest_multiple}"
                )

    def covered(self, seen: int) -> int:
        """How many leading tokens the slots stand for when `seen` tokens have been computed; the others are kept exactly.

        A pure function: c(s) = step ⌊(s - window) / step⌋ where that is more than the budget, else 0.
        """
        covered = (seen - self.window) // self.step * self.step
        return covered if covered > self.budget else 0

    def peak(self, in_flight: int) -> int:
        """The most tokens' worth of pages that a request holds, with `in_flight` tokens of steps that have not ended yet."""
        return self.budget + self.window + self.step + in_flight

    def to_dict(self) -> dict[str, Any]:
        """As `read` takes them."""
        return {"keepkv": {field.name: getattr(self, field.name) for field in fields(self)}}
