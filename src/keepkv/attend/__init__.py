"""Attend: attention over slots with votes and a dense tail, by one of several backends; `dispatch` picks one."""
