"""Compiled documents: compact caches as files, and a store of them."""
