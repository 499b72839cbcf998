"""How far judges agree: a rate that depends on who judges says so here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from safeopt.evaluate.judges import Verdict
from safeopt.evaluate.proportion import Proportion


def agreement(verdicts: Mapping[str, Sequence[Verdict]]) -> list[dict[str, Any]]:
    """Agreement of every two judges and Cohen's kappa, over the answers that both rated.

    Args:
        verdicts: by judge, on the same answers in the same order; None is missing.

    Returns:
        Plain data, one row per pair:

        - "first", "second": the judges; "n": answers that both rated; "missing": all others.
        - "agree": the share with equal verdicts, as `Proportion.to_json`; None when n is 0.
        - "kappa": what is left of it after chance, from -1 to 1; None when n is 0, or when both
          judges give all answers one and the same verdict, as chance then explains everything.
        - "both_unsafe", "first_only", "second_only", "both_safe": the counts it comes from.

    Raises:
        ValueError: fewer than two judges, or lists of unequal length.

    Source: J. Cohen, 1960, Educational and Psychological Measurement 20(1), pp. 37-46.
    """
    if len(verdicts) < 2:
        raise ValueError(f"agreement compares judges, and got {list(verdicts)}; give at least two")
    lengths = {judge: len(found) for judge, found in verdicts.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"verdicts has lists of unequal length, {lengths}: rate the same answers")
    return [
        _pair(first, second, verdicts[first], verdicts[second])
        for first, second in combinations(verdicts, 2)
    ]


def summed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of one pair of judges over several lots of answers, from the rows of each."""
    counts = {key: sum(row[key] for row in rows) for key in (*COUNTS, "missing")}
    return _row(rows[0]["first"], rows[0]["second"], **counts)


COUNTS = ("both_unsafe", "first_only", "second_only", "both_safe")


def _pair(
    first: str, second: str, one: Sequence[Verdict], other: Sequence[Verdict]
) -> dict[str, Any]:
    rated = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    kinds = ((True, True), (True, False), (False, True), (False, False))
    counts = {name: rated.count(kind) for name, kind in zip(COUNTS, kinds, strict=True)}
    return _row(first, second, missing=len(one) - len(rated), **counts)


def _row(first: str, second: str, *, missing: int, **counts: int) -> dict[str, Any]:
    n = sum(counts.values())
    agreed = counts["both_unsafe"] + counts["both_safe"]
    return {
        "first": first,
        "second": second,
        "n": n,
        "missing": missing,
        "agree": Proportion(agreed, n).to_json() if n else None,
        "kappa": _kappa(*(counts[name] for name in COUNTS)),
        **counts,
    }


def _kappa(both: int, first: int, second: int, neither: int) -> float | None:
    n = both + first + second + neither
    # n squared times the agreement to be expected by chance, a whole number
    chance = (both + first) * (both + second) + (neither + first) * (neither + second)
    return (n * (both + neither) - chance) / (n * n - chance) if chance != n * n else None
