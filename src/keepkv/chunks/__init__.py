"""Chunks: documents compiled alone, joined in one prompt in any order, and repaired for what they did not see."""
