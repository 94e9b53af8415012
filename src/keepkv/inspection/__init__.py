"""Inspection: what a compression made of a text, as numbers (anatomy.py), a page (html.py, svg.py) or a picture (png.py)."""
