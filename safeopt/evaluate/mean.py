"""The mean of a few numbers, with the interval that their spread and count allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from safeopt.evaluate.proportion import Z

# 97.5 % points of Student's t by degrees of freedom, where the series below is not yet exact.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def half_width(values: Sequence[float]) -> float:
    """Half the width of Student's 95 % interval for the mean of the values; 0 for one value."""
    if len(values) < 2:
        return 0.0
    return _student(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The mean of at least one value, and Student's 95 % interval of it."""
    mean, half = fmean(values), half_width(values)
    return mean, (mean - half, mean + half)


def _student(freedom: int) -> float:
    """97.5 % point; above 9 degrees of freedom by three terms of its series about z."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return Z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))
