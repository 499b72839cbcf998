"""Optimizers that protect selected weights, and `hold`, which protects them under any optimizer."""

from safeopt.optim.hold import hold
from safeopt.optim.safe_adamw import SafeAdamW

__all__ = ["SafeAdamW", "hold"]
