"""Texts and questions: reading files, tokens in a model's chat format, asking, and conversations."""
