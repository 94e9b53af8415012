"""The cache that a model reads and writes: `KeepCache`, its layers, its report."""

from keepkv.cache.cache import KeepCache as KeepCache
from keepkv.cache.report import Report as Report
