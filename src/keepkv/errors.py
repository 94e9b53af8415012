"""What keepkv raises when the caller, not the code, has to change something.

KeepKVError            every error below; the command line prints it as one line and exits with status 2
├── BudgetError        a budget that cannot be read, or is smaller than what must be kept
├── MethodError        a method that is unknown or cannot be loaded
├── ModelError         a model that cannot be found, loaded or compressed
├── BackendError       an attention backend that is unknown, or cannot run what it was asked for
└── InputError         a text that cannot be used
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KeepKVError(Exception):
    """Base of every error that keepkv raises on purpose. Its text says what was wrong, what was expected, and what to do."""


class BudgetError(KeepKVError):
    """The budget cannot be read or cannot be met."""


class MethodError(KeepKVError):
    """The method is not in the table, or cannot be loaded."""


class ModelError(KeepKVError):
    """The model cannot be found, loaded, or compressed."""


class BackendError(KeepKVError):
    """The attention backend is unknown, or cannot run on this device or with these tensors."""


class InputError(KeepKVError):
    """The text cannot be used."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Ends an error about an unknown name: with the known names nearest to it if there are any, otherwise with all of them.

    Example:
        >>> nearest("snap", ["snapkv", "h2o"])
        "did you mean 'snapkv'?"
    """
    names = list(names)
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(names)}."
