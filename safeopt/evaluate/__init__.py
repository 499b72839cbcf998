"""What is left afterwards: safety, skill, and how far the weights have moved."""

from safeopt.evaluate.ablation import ablated
from safeopt.evaluate.basin import basin
from safeopt.evaluate.directions import across, difference_direction, random_direction
from safeopt.evaluate.drift import drift
from safeopt.evaluate.generate import answers
from safeopt.evaluate.length import effective_length
from safeopt.evaluate.proportion import Proportion
from safeopt.evaluate.refusal import (
    PHRASES,
    PHRASES_VERSION,
    RefusalReport,
    is_refusal,
    phrases_hash,
    refusal_rate,
)
from safeopt.evaluate.stability import stability
from safeopt.evaluate.utility import accuracy, perplexity

__all__ = [
    "PHRASES",
    "PHRASES_VERSION",
    "Proportion",
    "RefusalReport",
    "ablated",
    "accuracy",
    "across",
    "answers",
    "basin",
    "difference_direction",
    "drift",
    "effective_length",
    "is_refusal",
    "perplexity",
    "phrases_hash",
    "random_direction",
    "refusal_rate",
    "stability",
]
