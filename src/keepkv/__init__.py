"""keepkv: a KV cache ten times smaller, with the model answering as if nothing had been removed.

Names are imported when they are first used, so that `keepkv --help` need not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keepkv.budget import Budget as Budget
    from keepkv.cache import KeepCache as KeepCache
    from keepkv.errors import BudgetError as BudgetError
    from keepkv.errors import InputError as InputError
    from keepkv.errors import KeepKVError as KeepKVError
    from keepkv.errors import MethodError as MethodError
    from keepkv.errors import ModelError as ModelError
    from keepkv.method import Method as Method
    from keepkv.methods import METHODS as METHODS
    from keepkv.methods import register as register
    from keepkv.report import Report as Report

__version__ = "0.1.0"
_HOME = {
    "Budget": "budget", "KeepCache": "cache", "METHODS": "methods", "Method": "method", "register": "methods",
    "Report": "report",
    "BudgetError": "errors", "InputError": "errors", "KeepKVError": "errors", "MethodError": "errors",
    "ModelError": "errors",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'keepkv' has no attribute {name!r}")
    return getattr(import_module(f"keepkv.{_HOME[name]}"), name)
