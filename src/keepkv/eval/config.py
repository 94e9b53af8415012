"""What a run is: its settings, as one flat TOML file in its folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from keepkv.budget import Budget
from keepkv.errors import InputError, nearest
from keepkv.methods import get
from keepkv.recipe import Recipe, RepeatMode

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


FILE = "config.toml"


@dataclass(frozen=True)
class Config:
    """Every setting that a record depends on. What is in GROWING may be added to later: the records of the rest stay."""

    model: str = "smollm2"
    tasks: tuple[str, ...] = ("needle", "needles-4", "facts", "pairs", "variables", "json")
    methods: tuple[str, ...] = ("keepkv", "snapkv", "h2o")
    budgets: tuple[str, ...] = ("10%", "5%")
    lengths: tuple[int, ...] = (1024,)  # tokens of a text
    samples: int = 5  # of every task and length
    by: str = "choice"  # choice: the likeliest of the right and wrong answers; answer: what the model writes
    question_aware: bool = False  # the question stands in the text when it is compressed
    repeat: RepeatMode = Recipe.repeat
    slot_dtype: str = Recipe.slot_dtype
    chunk: int = -1  # tokens read at a time; 0: all at once; -1: at once up to 8,192 tokens, 2,048 at a time beyond
    period: int = 256  # tokens between the folds of live caches (turns, drift)
    written: int = 2000  # tokens that drift writes
    max_new_tokens: int = 64  # of an answer
    haystack: str = ""  # a file or folder of prose; "": the documentation of installed packages
    data: tuple[str, ...] = ()  # files of other benchmarks
    dtype: str = "auto"
    seed: int = 0
    haystack_digest: str = ""
    data_digests: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """What all variants have in common."""
        return Recipe(
            slot_dtype=self.slot_dtype, repeat=self.repeat, chunk=None if self.chunk < 0 else self.chunk, seed=self.seed
        )

    def check(self) -> None:
        """Raises InputError, MethodError or BudgetError for what cannot be run."""
        for name, kinds in (("by", ("choice", "answer")), ("repeat", Recipe.REPEAT_MODES)):
            if getattr(self, name) not in kinds:
                raise InputError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(kinds)}")
        for name in ("samples", "period", "written", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: expected at least 1")
        if not self.lengths or min(self.lengths) < 64:
            raise InputError("lengths: expected at least 64 tokens, and at least one length")
        if not self.methods or not self.budgets or not (self.tasks or self.data):
            raise InputError("nothing to do: give at least one task (or a --data file), one method and one budget")
        for method in self.methods:
            get(method)
        for budget in self.budgets:
            Budget.parse(budget)


GROWING = {"tasks", "methods", "budgets", "lengths", "samples", "data", "data_digests"}


def written(config: Config) -> str:
    """As TOML: every value is a string, a number, a boolean, or a list of them, and JSON writes those as TOML does."""
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in asdict(config).items())


def load(file: Path, base: Config | None = None) -> Config:
    """Settings from a TOML file; what it does not name is as in `base`. Raises InputError for what cannot be read."""
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be read ({error.strerror}): expected a TOML file of settings") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{str(file)!r} is not TOML: {error}") from error
    return changed(base or Config(), found, str(file))


def changed(config: Config, values: Mapping[str, Any], where: str = "") -> Config:
    """The settings with other values. Raises InputError for a name or a kind of value that is not known."""
    known = {field.name: getattr(Config(), field.name) for field in fields(Config)}
    new: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{where}: unknown setting {name!r}: {nearest(name, known)}")
        value = tuple(value) if isinstance(value, list) else value
        if type(value) is not type(known[name]):
            raise InputError(f"{where}: {name} = {value!r}: expected a value like {known[name]!r}")
        if isinstance(value, tuple) and not all(isinstance(part, int if name == "lengths" else str) for part in value):
            raise InputError(
                f"{where}: {name} = {value!r}: expected a list of {'whole numbers' if name == 'lengths' else 'texts'}"
            )
        new[name] = value
    return replace(config, **new)


def continues(before: Config, now: Config, where: str) -> None:
    """Raises InputError if records of both cannot stand in one run."""
    for name, value in asdict(before).items():
        wanted = getattr(now, name)
        if name not in GROWING and value != wanted:
            raise InputError(
                f"the run in {where!r} has {name} = {value!r}, not {wanted!r}: go on with its settings, or give another folder"
            )
    for place, digest in zip(before.data, before.data_digests, strict=True):
        if dict(zip(now.data, now.data_digests, strict=True)).get(place, digest) != digest:
            raise InputError(f"{place!r} is not the file that the run in {where!r} was started with")
