"""The table of rivals: those of every file of this folder that has some, in the order of the list."""

from __future__ import annotations

from importlib import import_module

from keepkv.eval.rivals.rival import Rival

_FILES = ("bm25",)

RIVALS: dict[str, Rival] = {
    rival.name: rival for file in _FILES for rival in import_module(f"keepkv.eval.rivals.{file}").RIVALS
}
