"""Methods: one file for each paper, and the table of all. Copy `snapkv.py` for a new one, and name it in `registry.py`."""

from keepkv.methods.base import Method as Method
from keepkv.methods.registry import METHODS as METHODS
from keepkv.methods.registry import get as get
from keepkv.methods.registry import register as register
