"""One file per paper: each says how the paper scores weights, in terms of `score` and `select`."""

from __future__ import annotations

from safeopt.methods.esi import ESI
from safeopt.methods.fisher import Fisher
from safeopt.methods.guard import GuardObjective

__all__ = ["ESI", "Fisher", "GuardObjective"]
