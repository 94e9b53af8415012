"""The table of methods: every file of this folder that has some, in the order in which they are listed."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

from keepkv.errors import MethodError, nearest
from keepkv.methods.base import Method

_FILES = (
    "baselines",
    "streaming",
    "tova",
    "h2o",
    "snapkv",
    "pyramidkv",
    "pyramidinfer",
    "expected_attention",
    "keydiff",
    "knorm",
    "adakv",
    "criticalkv",
    "defensivekv",
    "kvzip",
    "kvcompose",
    "compactor",
    "rkv",
    "keepkv_paper",
    "kvmerger",
    "chelsea",
    "cam",
    "d2o",
    "minicache",
    "attention_matching",
    "attention_matching_budgets",
    "keepkv",
)

METHODS: dict[str, Method] = {
    method.name: method for file in _FILES for method in importlib.import_module(f"keepkv.methods.{file}").METHODS
}


def register(method: Method) -> Method:
    """Adds a method to the table of this process, and returns it.

    Raises:
        MethodError: if there is one of that name already.
    """
    if method.name in METHODS:
        raise MethodError(f"there is a method {method.name!r} already: give yours another name")
    METHODS[method.name] = method
    return method


def get(name: str | Method) -> Method:
    """The method called `name`, or NAME of FILE.py:NAME or package.module:NAME; a Method passes through.

    Raises:
        MethodError: if there is none, or if the file or module cannot be loaded.

    Example:
        >>> get("snapkv").paper
        'SnapKV, arXiv 2404.14469'
    """
    if isinstance(name, Method):
        return name
    if ":" in name:
        return _elsewhere(*name.rsplit(":", 1))
    if name.endswith(".py"):
        raise MethodError(f"{name!r} is a file: name the method in it too, as in {name}:NAME")
    if name not in METHODS:
        raise MethodError(f"unknown method {name!r}: {nearest(name, METHODS)} `keepkv methods` explains each")
    return METHODS[name]


def _elsewhere(place: str, name: str) -> Method:
    """The method called `name` in a file or a module."""
    try:
        module = _file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, OSError, ValueError) as error:
        raise MethodError(f"the method {place}:{name} cannot be loaded: {error}") from error
    method = getattr(module, name, None)
    if not isinstance(method, Method):
        raise MethodError(f"{name} in {place} is not a keepkv.Method: expected FILE.py:NAME or package.module:NAME")
    return method


@cache
def _file(path: Path) -> ModuleType:
    """A file run as a module, once: it may register what it defines."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
