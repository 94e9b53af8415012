"""Slots: the compact entries of a layer, ragged and flat, and the formats that their vectors are stored in."""
