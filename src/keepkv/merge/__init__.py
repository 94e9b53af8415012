"""Merge: what becomes of the entries that lose their slot.

`fit` is the default's rule, `similarity` what the papers' rules share. `per_head` makes merges of whole layers of them.
"""
