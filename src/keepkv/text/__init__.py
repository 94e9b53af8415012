"""Texts: prompts and their tokens, reading a text into a cache, asking about it, and conversations."""
