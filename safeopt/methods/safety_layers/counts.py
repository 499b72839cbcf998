"""Refusals counted while one range of layers after another is scaled, and kept in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from safeopt import artifact, names
from safeopt.evaluate.points import Points, described
from safeopt.methods.safety_layers.blocks import blocks_of
from safeopt.methods.safety_layers.scaling import scaled
from safeopt.progress import bar

Count = Callable[[Any], int | Mapping[str, int]]
"""From a model to its number of refused harmless prompts, or to one by each detector: the first
decides. `OverRejection` is one."""

Range = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """One range that was scaled: which sweep, first and last layer, and refusals by detector."""

    sweep: str
    layers: Range
    counts: Mapping[str, int]

    @property
    def count(self) -> int:
        """The count that decides: the first detector's."""
        return next(iter(self.counts.values()))


class ScaledCounts:
    """Counts of one model with ranges of its layers scaled, each measured once; see `localise`."""

    def __init__(
        self, model: Any, over_rejection: Count, o_proj: bool, blocks: str | None, cache: Any
    ) -> None:
        self.model, self.blocks = model, blocks_of(model, blocks)
        self._count, self._o_proj = over_rejection, o_proj
        self.settings = {
            "model": artifact.fingerprint(model),
            "dtypes": sorted({str(t.dtype) for t in names.parameters(model).values()}),
            "blocks": self.blocks.name,
            "o_proj": o_proj,
            "over_rejection": described("over_rejection", over_rejection, cache),
            "torch": str(torch.__version__),
        }
        self._points = Points(None if cache is None else Path(cache), self.settings)

    def unscaled(self) -> dict[str, int]:
        """Refusals of the model as it is."""
        return self._at({"alpha": 1.0}, partial(self._count, self.model))

    def sweep(
        self, name: str, ranges: list[Range], alpha: float, progress: bool
    ) -> tuple[Step, ...]:
        """Scale each range by alpha in turn, and count."""
        steps = []
        for layers in bar(ranges, progress, name, "range"):
            at = {"alpha": float(alpha), "first": layers[0], "last": layers[1]}
            counts = self._at(at, partial(self._scaled, layers, alpha))
            steps.append(Step(name, layers, counts))
        return tuple(steps)

    def _scaled(self, layers: Range, alpha: float) -> Any:
        with scaled(self.model, layers, alpha, o_proj=self._o_proj, blocks=self.blocks.name):
            return self._count(self.model)

    def _at(self, at: dict[str, float], measure: Callable[[], Any]) -> dict[str, int]:
        known = self._points.get(at) or self._points.add(at, {"counts": _checked(measure())})
        return dict(known["counts"])


def bounds(
    name: str, tried: Iterable[int] | None, around: int, window: int, low: int, high: int
) -> list[int]:
    """The values a bound takes in a sweep: those `tried`, else `around` +- window in low..high.

    Raises:
        ValueError: `tried`, by its `name`, is empty or leaves low..high; a window below 1.
    """
    if window < 1:
        raise ValueError(f"window is {window}; give at least 1 layer")
    if tried is None:
        return list(range(max(low, around - window), min(high, around + window) + 1))
    values = sorted(set(tried))
    if not values or not all(low <= value <= high for value in values):
        raise ValueError(
            f"{name} is {values}; give layers from {low} to {high}, or None for those around start"
        )
    return values


def _checked(counts: Any) -> dict[str, int]:
    named = dict(counts) if isinstance(counts, Mapping) else {"refused": counts}
    wrong = [n for n in named.values() if isinstance(n, bool) or not isinstance(n, int) or n < 0]
    if wrong or not named:
        raise ValueError(
            f"over_rejection returned {counts!r}; it must be the number of refused prompts, or one"
            " number by each detector"
        )
    return named
