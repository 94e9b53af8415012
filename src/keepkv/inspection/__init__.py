"""Inspection: what a compression made of a text, as numbers, figures and one HTML page."""
