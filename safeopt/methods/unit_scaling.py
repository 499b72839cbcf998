"""Putting the scores of units of different layers on one scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from safeopt.units import UnitMap

Normalise: TypeAlias = Literal["zscore", "raw", "rank"]
NORMALISE = ("zscore", "raw", "rank")

Place: TypeAlias = tuple[int | None, str]


class Scaling:
    """Fitted to one set of scores, applied to that or another: values within layer and kind.

    "zscore": minus the mean, over the standard deviation (only centred where that is 0). "rank":
    the share of the fitted scores below, ties counted half, 0 to 1. "raw": as they are.

    Args:
        units: says which groups lie in one layer and are of one kind.
        scores: (units,) by group.
        how: one of the three.

    Raises:
        ValueError: an unknown `how`.
    """

    def __init__(self, units: UnitMap, scores: Mapping[str, Tensor], how: Normalise) -> None:
        if how not in NORMALISE:
            raise ValueError(f"normalise is {how!r}; it must be one of {NORMALISE}")
        self._how = how
        self._places = {name: group.place for name, group in units.items()}
        pools: dict[Place, list[Tensor]] = {}
        for name, place in self._places.items():
            pools.setdefault(place, []).append(scores[name].double().cpu())
        self._fitted = {place: torch.cat(pool).sort().values for place, pool in pools.items()}

    def __call__(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Float64 (units,) by group, on the CPU."""
        return {
            name: self._scaled(scores[name].double().cpu(), self._fitted[place])
            for name, place in self._places.items()
        }

    def _scaled(self, values: Tensor, fitted: Tensor) -> Tensor:
        if self._how == "raw":
            return values
        if self._how == "rank":
            below, upto = (torch.searchsorted(fitted, values, right=r) for r in (False, True))
            return (below + upto).double() / (2 * len(fitted))
        deviation = fitted.std(correction=0)
        return (values - fitted.mean()) / (deviation if deviation > 0 else 1)
