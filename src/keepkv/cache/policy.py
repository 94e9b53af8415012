"""What a budget means for the rows of a batch."""

from __future__ import annotations

from keepkv.budget import Budget

Limits = str | float | Budget
