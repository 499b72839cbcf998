"""What is left afterwards: safety, skill, and how far the weights have moved."""

from safeopt.evaluate.drift import drift
from safeopt.evaluate.generate import answers
from safeopt.evaluate.proportion import Proportion
from safeopt.evaluate.refusal import (
    PHRASES,
    PHRASES_VERSION,
    RefusalReport,
    is_refusal,
    phrases_hash,
    refusal_rate,
)
from safeopt.evaluate.utility import accuracy, perplexity

__all__ = [
    "PHRASES",
    "PHRASES_VERSION",
    "Proportion",
    "RefusalReport",
    "accuracy",
    "answers",
    "drift",
    "is_refusal",
    "perplexity",
    "phrases_hash",
    "refusal_rate",
]
