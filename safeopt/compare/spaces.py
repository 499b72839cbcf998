"""The input spaces of a comparison: what training may answer differently, by leak and by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from safeopt.input_space import InputSpace
from safeopt.methods.null_space import InputMoments, input_moments, null_space
from safeopt.scores import Batch

TASK_ROWS = 800
"""Training rows that tell which inputs the task has, at most."""


class Spaces:
    """Input spaces of the model that a comparison trains; moments are taken once for each set.

    Args:
        model: the model before training; never changed.
        safety: batches of harmful prompts with refusals.
        progress: show a bar on stderr while moments are taken.
    """

    def __init__(
        self, model: torch.nn.Module, safety: Sequence[Batch], *, progress: bool = False
    ) -> None:
        self.batches, self._model, self._progress = safety, model, progress
        self._tasks: dict[Any, InputMoments] = {}

    @cached_property
    def safety(self) -> InputMoments:
        """The moments of the refusals."""
        return input_moments(self._model, self.batches, progress=self._progress)

    def plain(self, leak: float) -> InputSpace:
        """The directions that safety uses least."""
        return null_space(self.safety, leak=leak)

    def for_task(
        self, leak: float, key: object, batches: Callable[[], Sequence[Batch]]
    ) -> InputSpace:
        """Those that the task has most of for what safety has of them.

        ``key`` stands for the rows of ``batches``, which are made and looked at once for each key.
        """
        if key not in self._tasks:
            self._tasks[key] = input_moments(self._model, batches(), progress=self._progress)
        return null_space(self.safety, self._tasks[key], leak=leak)
