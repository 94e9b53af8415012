"""keepkv: makes the KV cache of a language model about ten times smaller.

Every public name is in `__all__`. They are imported when they are first used, so that `keepkv --help` need not wait for
PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keepkv.budget import Budget as Budget
    from keepkv.cache.cache import KeepCache as KeepCache
    from keepkv.cache.report import Report as Report
    from keepkv.documents.document import Document as Document
    from keepkv.documents.document import answer as answer
    from keepkv.documents.document import compile_text as compile_text
    from keepkv.documents.document import load as load
    from keepkv.documents.document import save as save
    from keepkv.documents.joining.joined import joined as joined
    from keepkv.documents.store import Store as Store
    from keepkv.documents.tiers import Tiers as Tiers
    from keepkv.errors import BackendError as BackendError
    from keepkv.errors import BudgetError as BudgetError
    from keepkv.errors import InputError as InputError
    from keepkv.errors import KeepKVError as KeepKVError
    from keepkv.errors import MethodError as MethodError
    from keepkv.errors import ModelError as ModelError
    from keepkv.methods.base import Method as Method
    from keepkv.methods.registry import METHODS as METHODS
    from keepkv.methods.registry import register as register
    from keepkv.recipe import Recipe as Recipe

__version__ = "0.1.0"
_MODULES = {
    "budget": ("Budget",),
    "cache.cache": ("KeepCache",),
    "cache.report": ("Report",),
    "documents.document": ("Document", "answer", "compile_text", "load", "save"),
    "documents.joining.joined": ("joined",),
    "documents.store": ("Store",),
    "documents.tiers": ("Tiers",),
    "errors": ("BackendError", "BudgetError", "InputError", "KeepKVError", "MethodError", "ModelError"),
    "methods.base": ("Method",),
    "methods.registry": ("METHODS", "register"),
    "recipe": ("Recipe",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'keepkv' has no attribute {name!r}")
    return getattr(import_module(f"keepkv.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
