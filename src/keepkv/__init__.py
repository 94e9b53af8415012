"""keepkv: a KV cache ten times smaller, with the model answering as if nothing had been removed.

Names are imported when they are first used, so that `keepkv --help` need not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keepkv.budget import Budget as Budget
    from keepkv.cache import KeepCache as KeepCache
    from keepkv.chunks.documents import joined as joined
    from keepkv.errors import BudgetError as BudgetError
    from keepkv.errors import InputError as InputError
    from keepkv.errors import KeepKVError as KeepKVError
    from keepkv.errors import MethodError as MethodError
    from keepkv.errors import ModelError as ModelError
    from keepkv.files.documents import Document as Document
    from keepkv.files.documents import Recipe as Recipe
    from keepkv.files.documents import answer as answer
    from keepkv.files.documents import compile_text as compile_text
    from keepkv.files.documents import load as load
    from keepkv.files.documents import save as save
    from keepkv.files.store import Store as Store
    from keepkv.files.tiers import Tiers as Tiers
    from keepkv.method import Method as Method
    from keepkv.methods import METHODS as METHODS
    from keepkv.methods import register as register
    from keepkv.report import Report as Report

__version__ = "0.1.0"
_HOME = {
    "Budget": "budget", "KeepCache": "cache", "METHODS": "methods", "Method": "method", "register": "methods",
    "Report": "report",
    "Document": "files.documents", "Recipe": "files.documents", "answer": "files.documents",
    "compile_text": "files.documents", "load": "files.documents", "save": "files.documents", "joined": "chunks.documents",
    "Store": "files.store", "Tiers": "files.tiers",
    "BudgetError": "errors", "InputError": "errors", "KeepKVError": "errors", "MethodError": "errors",
    "ModelError": "errors",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'keepkv' has no attribute {name!r}")
    return getattr(import_module(f"keepkv.{_HOME[name]}"), name)
