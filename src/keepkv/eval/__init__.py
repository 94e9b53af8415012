"""The evaluation: tasks, runs that can be resumed, statistics over pairs, and reports. `keepkv eval` and `keepkv report`."""

from __future__ import annotations
