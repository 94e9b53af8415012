"""Joining: several documents in one prompt, and repairing what joining loses.

joined.py has `joined`, what users see; join.py puts caches behind one another; cacheblend.py and cachecraft.py say which tokens
are read again with the earlier documents in view, after the papers of these names.
"""
