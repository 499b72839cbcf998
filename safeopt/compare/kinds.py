"""What an arm of a comparison is made of: what it may build on, and what it makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from safeopt.compare.directions import Directions
from safeopt.compare.regions import Regions
from safeopt.mask import SafetyMask
from safeopt.scores import Scores


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an arm may build on: the model to train, its scores, and what every arm shares.

    ``lr`` and ``weight_decay`` are those of torch's AdamW. ``seed`` is the seed of the run: random
    masks and directions are drawn from it, so that each seed has fresh ones. ``directions`` is None
    where the comparison was given no unaligned model, ``regions`` where it was given no utility
    rows. ``freeze`` is what an arm of ``Kind.draws`` freezes beside what it draws.
    """

    model: torch.nn.Module
    scores: Scores
    lr: float
    weight_decay: float
    seed: int
    directions: Directions | None = None
    regions: Regions | None = None
    freeze: SafetyMask | None = None


@dataclass(frozen=True)
class Plan:
    """An optimizer over the model's weights, and the mask it was given (None for all weights).

    ``after`` is done in place to a copy of the trained model wherever the curve is measured: for
    methods that mend a model after training.
    """

    optimizer: torch.optim.Optimizer
    mask: SafetyMask | None = None
    after: Callable[[torch.nn.Module], object] | None = None


Make = Callable[[Context, Any], Plan]
Pick = Callable[[Context, Any], SafetyMask]


@dataclass(frozen=True)
class Kind:
    """One entry of the table of arms: a summary, and the function that makes the plan.

    ``takes`` says what VALUE in ``name:VALUE`` is: ``"fraction"`` in (0, 1), ``"factor"`` or
    ``"strength"`` above 0, ``"layers"``, which is FIRST-LAST, or ``""`` for an arm without a value.
    ``control`` tells whether it is a control: of the arm whose name it continues, as ``spa-random``
    is of ``spa``. ``trains`` says what it can train: ``"full"`` weights, ``"lora"`` adapters or
    ``"both"``. ``directed`` arms need an unaligned model, ``located`` arms utility rows.
    ``freezes`` is the mask of an arm that freezes; such arms can be joined. An arm that ``draws``
    weights somewhere can freeze others beside.
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
