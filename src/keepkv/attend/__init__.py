"""Attend: attention over slots with votes and over a tail of exact tokens, by one of several backends. `dispatch` picks."""
