"""A share of cases, with the interval that its sample size allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.959963984540054  # 97.5 % point of the normal distribution


def wilson(rate: float, n: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) for a rate in [0, 1] among n cases."""
    centre = (rate + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2))
    return 0.0 if rate == 0 else centre - half, 1.0 if rate == 1 else centre + half


@dataclass(frozen=True)
class Proportion:
    """A number of successes among n cases; ValueError unless 0 <= successes <= n and n >= 1."""

    successes: int
    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n is {self.n}: a proportion needs at least one case")
        if not 0 <= self.successes <= self.n:
            raise ValueError(f"successes is {self.successes}; it must lie between 0 and n={self.n}")

    @property
    def rate(self) -> float:
        """The share of successes, in [0, 1]."""
        return self.successes / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Wilson (1927), which stays honest at rates of 0 and 1."""
        return wilson(self.rate, self.n)

    def to_json(self) -> dict[str, object]:
        """Return successes, n, rate and interval as plain values."""
        return {
            "successes": self.successes,
            "n": self.n,
            "rate": self.rate,
            "interval": list(self.interval),
        }

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}] (n={self.n})"
