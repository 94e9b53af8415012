"""Observe: what the attention of a layer shows while a model reads, in bounded memory."""
