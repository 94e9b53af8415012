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
from keepkv.recipe import Recipe, RepeatMode, lookback_of
from keepkv.slots.slot_dtype import slot_dtype_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


FILE = "config.toml"
RENAMED = {"reference": "repeat"}  # what settings of older runs are called now
RENAMED_VALUES = {"context": "never", "recall": "always"}
LISTED = {"model": "models", "slot_dtype": "slot_dtypes"}  # what had one value in older runs and is a list now


@dataclass(frozen=True)
class Config:
    """The settings of a run: everything that its records depend on.

    A run can be continued only with the same settings, except for those in GROWING, which may be added to.

    Example:
        >>> Config(samples=2, tasks=("needle",), models=("smollm2", "gemma-3-270m")).validate()
        >>> Config(by="luck").validate()
        Traceback (most recent call last):
        keepkv.errors.InputError: by = 'luck': expected one of choice, answer
    """

    models: tuple[str, ...] = ("smollm2",)
    tasks: tuple[str, ...] = ("needle", "needles-4", "facts", "pairs", "variables", "json")
    methods: tuple[str, ...] = ("keepkv", "snapkv", "h2o")  # and rivals; "all": every method of the table
    budgets: tuple[str, ...] = ("10%", "5%")
    lengths: tuple[int, ...] = (1024,)  # tokens of a text
    samples: int = 5  # of every task and length
    by: str = "choice"  # choice: the likeliest of the right and wrong answers; answer: what the model writes
    question_aware: bool = False  # the question stands in the text when it is compressed
    repeat: RepeatMode = Recipe.repeat
    slot_dtypes: tuple[str, ...] = (Recipe.slot_dtype,)
    full_dtype: str = Recipe.full_dtype  # in which the full cache is counted
    chunk: int = -1  # tokens read at a time; 0: all at once; -1: at once up to 8,192 tokens, 2,048 at a time beyond
    lookback: str = str(Recipe.lookback)  # tokens that come back for a question: a number, auto, or off
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
        """The recipe of every variant, but for its method, budget and slot dtype."""
        return Recipe(
            repeat=self.repeat,
            chunk=None if self.chunk < 0 else self.chunk,
            seed=self.seed,
            full_dtype=self.full_dtype,
            lookback=lookback_of(self.lookback),
        )

    def validate(self) -> None:
        """Checks that a run with these settings can start.

        Raises:
            InputError: for a value that is out of range, or nothing to do.
            BudgetError: for a budget that cannot be read.
        """
        for name, modes in (("by", ("choice", "answer")), ("repeat", Recipe.REPEAT_MODES)):
            if getattr(self, name) not in modes:
                raise InputError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(modes)}")
        for name in ("samples", "period", "written", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: expected at least 1")
        if not self.lengths or min(self.lengths) < 64:
            raise InputError(f"lengths = {list(self.lengths)}: expected one length or several, each of at least 64 tokens")
        if not (self.models and self.methods and self.budgets and self.slot_dtypes and (self.tasks or self.data)):
            raise InputError(
                "nothing to do: give at least one task (or a --data file), one method, one budget, one model and one slot dtype"
            )
        for budget in self.budgets:
            Budget.parse(budget)
        for slot_dtype in self.slot_dtypes:
            slot_dtype_of(slot_dtype)
        Recipe(full_dtype=self.full_dtype, lookback=lookback_of(self.lookback))


GROWING = {"models", "tasks", "methods", "budgets", "slot_dtypes", "lengths", "samples", "data", "data_digests"}


def to_toml(config: Config) -> str:
    """As TOML: every value is a string, a number, a boolean, or a list of them, and JSON writes those as TOML does."""
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in asdict(config).items())


def load_config(file: Path, base: Config | None = None) -> Config:
    """Settings from a TOML file; what it does not name is as in `base`. Raises InputError for what cannot be read."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be read ({error.strerror}): expected a TOML file of settings") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{str(file)!r} is not TOML: {error}") from error
    return changed(base or Config(), values, str(file))


def load_run(folder: Path) -> Config:
    """The settings of a run. In runs of before there was a choice, slots were stored as floats. Raises as `load_config`."""
    return load_config(folder / FILE, replace(Config(), slot_dtypes=("float",)))


def changed(config: Config, values: Mapping[str, Any], where: str = "") -> Config:
    """The settings with other values. Raises InputError for an unknown name, or a value of another kind."""
    defaults = {field.name: getattr(Config(), field.name) for field in fields(Config)}
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name in RENAMED:
            raise InputError(_renamed(where, name, value))
        if name in LISTED and isinstance(value, str):
            name, value = LISTED[name], [value]
        if name not in defaults:
            raise InputError(f"{where}: unknown setting {name!r}: {nearest(name, defaults)}")
        default = defaults[name]
        value = tuple(value) if isinstance(value, list) else value
        if type(value) is not type(default):
            example = json.dumps(default, ensure_ascii=False)
            raise InputError(f"{where}: {name} = {json.dumps(value, default=str)}: expected a value like {example}")
        item_type, items = (int, "whole numbers") if name == "lengths" else (str, "strings")
        if isinstance(value, tuple) and not all(isinstance(item, item_type) for item in value):
            raise InputError(f"{where}: {name} = {json.dumps(value, default=str)}: expected a list of {items}")
        changes[name] = value
    return replace(config, **changes)


def _renamed(where: str, name: str, value: Any) -> str:
    """What to write instead of a line of an older run's file."""
    line = f'{RENAMED[name]} = "{RENAMED_VALUES.get(str(value), value)}"'
    return f"{where}: the setting {name!r} of older runs is called {RENAMED[name]!r} now: write {line} instead of that line"


def continues(before: Config, now: Config, where: str) -> None:
    """Checks that records of both settings can stand in one run. Raises InputError if they cannot."""
    for name, old in asdict(before).items():
        new = getattr(now, name)
        if name not in GROWING and old != new:
            raise InputError(
                f"the run in {where!r} has {name} = {old!r}, not {new!r}: continue it with its own settings, "
                "or start another run in another folder"
            )
    digests = dict(zip(now.data, now.data_digests, strict=True))
    for place, digest in zip(before.data, before.data_digests, strict=True):
        if digests.get(place, digest) != digest:
            raise InputError(
                f"{place!r} has changed since the run in {where!r} was started: restore the file, or give another folder"
            )
