"""Optimizers that protect selected weights, and `hold`, which protects them under any optimizer."""

from safeopt.optim.asft_adamw import AsFTAdamW
from safeopt.optim.gradients import live_gradients
from safeopt.optim.hold import hold
from safeopt.optim.project_step import project_step
from safeopt.optim.safe_adamw import SafeAdamW

__all__ = ["AsFTAdamW", "SafeAdamW", "hold", "live_gradients", "project_step"]
