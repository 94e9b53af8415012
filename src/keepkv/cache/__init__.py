"""The cache that a model reads and writes.

cache.py has `KeepCache`, what users see. base.py is what transformers asks of a cache, layer.py one layer's state,
proxies.py and attention_function.py how the cache sees queries, policy.py and observations.py what the next compression
goes by and starts from, backing.py exact keys and values outside the device, report.py what a cache holds, auto_budget.py the
budget "auto".
"""

from keepkv.cache.cache import KeepCache as KeepCache
from keepkv.cache.report import Report as Report
