"""What an arm of a comparison is made of: what it may build on, and what it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from safeopt.compare.at_hand import AtHand
from safeopt.compare.directions import Directions
from safeopt.compare.regions import Regions
from safeopt.compare.spaces import Spaces
from safeopt.controller import Controller
from safeopt.data import Row
from safeopt.mask import SafetyMask
from safeopt.scores import Batch, Scores

NO_DATA, REFUSALS = "no safety data", "refusal set"
LEAGUES = {
    NO_DATA: "no safety data while training, only what was made beforehand",
    REFUSALS: "a small refusal set at hand while training",
}
"""The two leagues of arms, which are never ranked together."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an arm may build on: the model to train, its scores, and what every arm shares.

    ``lr`` and ``weight_decay`` are those of torch's AdamW. ``seed`` is the seed of the run: random
    masks and directions are drawn from it, so that each seed has fresh ones. ``directions`` is None
    where the comparison was given no unaligned model, ``regions`` where it was given no utility
    rows. ``freeze`` is what an arm of ``Kind.draws`` freezes beside what it draws.
    ``refusals_at_hand`` is None in an arm of the league without safety data. ``task`` makes batches
    of the first rows that the run will train on.
    """

    model: torch.nn.Module
    scores: Scores
    lr: float
    weight_decay: float
    seed: int
    directions: Directions | None = None
    regions: Regions | None = None
    freeze: SafetyMask | None = None
    refusals_at_hand: AtHand | None = None
    spaces: Spaces | None = None
    task: Callable[[], Sequence[Batch]] = tuple


@dataclass(frozen=True)
class Plan:
    """An optimizer over the model's weights, and the mask it was given (None for all weights).

    ``after`` is done in place to a copy of the trained model wherever the curve is measured: for
    methods that mend a model after training. ``rows`` makes of the training rows as many others.
    ``controller`` acts inside the steps; what it keeps as ``log`` goes into the run's record.
    """

    optimizer: torch.optim.Optimizer
    mask: SafetyMask | None = None
    after: Callable[[torch.nn.Module], object] | None = None
    rows: Callable[[list[Row]], list[Row]] | None = None
    controller: Controller | None = None


Make = Callable[[Context, Any], Plan]
Pick = Callable[[Context, Any], SafetyMask]


@dataclass(frozen=True)
class Kind:
    """One entry of the table of arms: a summary, and the function that makes the plan.

    ``takes`` says what VALUE in ``name:VALUE`` is: ``"fraction"`` in (0, 1), ``"factor"`` or
    ``"strength"`` above 0, a whole ``"count"``, ``"layers"``, which is FIRST-LAST, or ``""`` for an
    arm without a value.
    ``control`` tells whether it is a control: of the arm whose name it continues, as ``spa-random``
    is of ``spa``. ``trains`` says what it can train: ``"full"`` weights, ``"lora"`` adapters or
    ``"both"``. ``directed`` arms need an unaligned model, ``located`` arms utility rows.
    ``freezes`` is the mask of an arm that freezes; such arms can be joined. An arm that ``draws``
    weights somewhere can freeze others beside. ``at_hand`` puts an arm into the league that may use
    refusals while it trains.
    """

    summary: str
    make: Make
    takes: str = "fraction"
    control: bool = False
    trains: str = "full"
    directed: bool = False
    located: bool = False
    freezes: Pick | None = None
    draws: bool = False
    at_hand: bool = False

    @property
    def league(self) -> str:
        """One of LEAGUES."""
        return REFUSALS if self.at_hand else NO_DATA
