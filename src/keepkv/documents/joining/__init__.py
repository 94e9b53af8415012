"""Joining: several documents in one prompt, and repairing what joining loses."""
