"""One file per paper: each is a recipe over scores, masks and directions."""

from __future__ import annotations

from safeopt.methods.esi import ESI
from safeopt.methods.fisher import Fisher
from safeopt.methods.guard import GuardObjective
from safeopt.methods.safe_lora import apply_safe_lora
from safeopt.methods.safe_lora_weights import project_weights
from safeopt.methods.short_tune import short_fine_tune_direction

__all__ = [
    "ESI",
    "Fisher",
    "GuardObjective",
    "apply_safe_lora",
    "project_weights",
    "short_fine_tune_direction",
]
