"""Slots: the compact entries of a layer, ragged and flat, and the ways in which their vectors are stored."""
