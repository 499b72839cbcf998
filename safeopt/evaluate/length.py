"""The effective perturbation length: how far along a line a model stays safe."""

from __future__ import annotations

from collections.abc import Sequence


def effective_length(
    alphas: Sequence[float], rates: Sequence[float], tau: float
) -> dict[str, float | bool | None]:
    """Effective perturbation length of one line: the largest |a| with attack success <= tau.

    From 0 outwards, per sign, to the first crossing, linear between the last point at most tau and
    the first above it; "length" is the smaller of the two ("positive", "negative"), None where
    neither is reached up to "explored". AsFT (arXiv 2506.08473) Eq. 5 asks for S >= tau though
    lower is safer; that is a sign slip, and S <= tau is meant. 0 where the start is above tau.
    """
    pairs = sorted(zip(alphas, rates, strict=True))
    sides = {
        "positive": _crossing([pair for pair in pairs if pair[0] >= 0], tau),
        "negative": _crossing([(-a, rate) for a, rate in reversed(pairs) if a <= 0], tau),
    }
    reached = [length for length in sides.values() if length is not None]
    return {
        "length": min(reached) if reached else None,
        "reached": bool(reached),
        **sides,
        "explored": min(pairs[-1][0], -pairs[0][0]),
        "tau": tau,
    }


def _crossing(pairs: list[tuple[float, float]], tau: float) -> float | None:
    last, before = pairs[0]
    if before > tau:
        return 0.0
    for a, rate in pairs[1:]:
        if rate > tau:
            return last + (tau - before) / (rate - before) * (a - last)
        last, before = a, rate
    return None
