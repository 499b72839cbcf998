"""What finds regions in the model that a comparison trains: units, and scores of two sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import torch

from safeopt.methods.attribution import SNIP, Wanda
from safeopt.methods.ssah import SSAH
from safeopt.scores import Batch, Scores, score
from safeopt.units import UnitMap


class Regions:
    """Scores of the same model on safety and on utility rows, each made once, where asked for.

    ``scores(finder, "safety")`` and ``scores(finder, "utility")`` are those of SNIP and Wanda by
    weight, of SSAH by unit of ``units``.

    Args:
        model: the model before training; never changed.
        safety: batches of harmful prompts with refusals.
        utility: batches of harmless prompts with answers.
        progress: show a bar on stderr while scores are made.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        safety: Sequence[Batch],
        utility: Sequence[Batch],
        *,
        progress: bool = False,
    ) -> None:
        self.model, self._progress = model, progress
        self._batches = {"safety": safety, "utility": utility}
        self.scores: Callable[[str, str], Scores] = cache(self._scores)

    @cached_property
    def units(self) -> UnitMap:
        """The MLP and attention channels of the model."""
        return UnitMap.of(self.model)

    def _scores(self, finder: str, rows: str) -> Scores:
        made: dict[str, Callable[[], Any]] = {
            "snip": SNIP, "wanda": Wanda, "ssah": lambda: SSAH(units=self.units)
        }  # fmt: skip
        return score(self.model, self._batches[rows], made[finder](), progress=self._progress)
