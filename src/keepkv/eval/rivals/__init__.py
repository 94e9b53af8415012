"""Rivals: what else could be done with the same bytes, measured on the same questions. See `registry` for the list."""
