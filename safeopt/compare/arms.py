"""The arms of a comparison: each name stands for an optimizer, and what it protects."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from safeopt import artifact
from safeopt.mask import SafetyMask
from safeopt.optim import SafeAdamW
from safeopt.optim.anchor import Mode, Shares
from safeopt.scores import Scores
from safeopt.selection import select


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an arm may build on: the model to train, its scores, and what every arm shares.

    ``lr`` and ``weight_decay`` are those of torch's AdamW. ``seed`` is the seed of the run: random
    masks are drawn from it, so that each seed has a fresh one.
    """

    model: torch.nn.Module
    scores: Scores
    lr: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class Plan:
    """An optimizer over the model's weights, and the mask it was given (None for all weights)."""

    optimizer: torch.optim.Optimizer
    mask: SafetyMask | None = None


Make = Callable[[Context, float], Plan]


@dataclass(frozen=True)
class Kind:
    """One entry of the table of arms: a summary, and the function that makes the plan.

    ``takes`` says what VALUE in ``name:VALUE`` is: ``"fraction"`` in (0, 1), ``"factor"`` or
    ``"strength"`` above 0, or ``""`` for an arm without a value. ``control`` tells whether it is a
    random control.
    """

    summary: str
    make: Make
    takes: str = "fraction"
    control: bool = False


Pick = Callable[[Context, float], SafetyMask]


def _top(context: Context, fraction: float) -> SafetyMask:
    return select(context.scores, fraction)


def _random(context: Context, fraction: float) -> SafetyMask:
    return select(context.scores, fraction, order="random", seed=context.seed)


def _shuffled(context: Context, fraction: float) -> SafetyMask:
    return _top(context, fraction).shuffle(context.seed)


def _masked(argument: str, pick: Pick) -> Make:
    """SafeAdamW with the picked mask for ``argument``, ``"freeze"`` (SPA) or ``"train"`` (SET)."""

    def make(context: Context, fraction: float) -> Plan:
        mask = pick(context, fraction)
        named = context.model.named_parameters()
        decay = context.weight_decay
        return Plan(
            SafeAdamW(named, context.lr, weight_decay=decay, **{argument: mask}),  # type: ignore[arg-type]
            mask,
        )

    return make


def _anchored(shares: Callable[[Context], Shares], mode: Mode = "coupled") -> Make:
    """SafeAdamW that draws all weights to their start, VALUE being its ``anchor_strength``."""

    def make(context: Context, strength: float) -> Plan:
        optimizer = SafeAdamW(
            context.model.named_parameters(),
            context.lr,
            weight_decay=context.weight_decay,
            anchor=shares(context),
            anchor_strength=strength,
            anchor_mode=mode,
        )
        return Plan(optimizer)

    return make


def _uniform(context: Context) -> Shares:
    return "uniform"


def _scores(context: Context) -> Scores:
    return context.scores


def _mixed(context: Context) -> Scores:
    """The scores, each at another place of its tensor: who is drawn more is left to chance."""
    mixed = {}
    for name, scores in context.scores.items():
        seed = int(artifact.digest([str(context.seed), name])[:15], 16)
        order = torch.randperm(scores.numel(), generator=torch.Generator().manual_seed(seed))
        mixed[name] = scores.reshape(-1)[order.to(scores.device)].view(scores.shape)
    return Scores(mixed, {"method": "shuffle", "of": context.scores.provenance})


def _adamw(context: Context, factor: float) -> Plan:
    named = context.model.named_parameters()
    return Plan(torch.optim.AdamW(named, context.lr * factor, weight_decay=context.weight_decay))


# A later method adds one entry here.
ARMS: dict[str, Kind] = {
    "adamw": Kind("all weights, torch's AdamW: the baseline", _adamw, takes=""),
    "adamw-lr": Kind("the same at VALUE times the learning rate", _adamw, takes="factor"),
    "spa": Kind("freeze the top VALUE of the scored weights", _masked("freeze", _top)),
    "spa-random": Kind(
        "freeze as many at random over the model", _masked("freeze", _random), control=True
    ),
    "spa-shuffle": Kind(
        "freeze as many at random in each tensor", _masked("freeze", _shuffled), control=True
    ),
    "set": Kind("train only the top VALUE of the scored weights", _masked("train", _top)),
    "set-random": Kind(
        "train as many at random over the model", _masked("train", _random), control=True
    ),
    "set-shuffle": Kind(
        "train as many at random in each tensor", _masked("train", _shuffled), control=True
    ),
    "l2": Kind("draw all weights to their start, strength VALUE", _anchored(_uniform), "strength"),
    "l2-decoupled": Kind(
        "the same beside the weight decay", _anchored(_uniform, "decoupled"), "strength"
    ),
    "anchor": Kind("draw each weight by its score, strength VALUE", _anchored(_scores), "strength"),
    "anchor-decoupled": Kind(
        "the same beside the weight decay", _anchored(_scores, "decoupled"), "strength"
    ),
    "anchor-shuffle": Kind(
        "draw by scores shuffled in each tensor", _anchored(_mixed), "strength", control=True
    ),
}


@dataclass(frozen=True)
class Arm:
    """One arm with its value, for example ``spa`` with 0.01; ``str(arm)`` is ``"spa:0.01"``."""

    name: str
    value: float | None

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read ``"adamw"`` or ``"spa:0.01"``.

        Raises:
            ValueError: unknown name (with near misses), or a value that is missing, superfluous or
                out of range.
        """
        name, colon, raw = text.partition(":")
        if name not in ARMS:
            near = difflib.get_close_matches(name, ARMS, 3)
            hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(ARMS)}"
            raise ValueError(f"arm {text!r} does not exist; {hint}")
        takes = ARMS[name].takes
        if not takes:
            if colon:
                raise ValueError(f"arm {text!r}: {name} takes no value; write {name}")
            return cls(name, None)
        try:
            value = float(raw)
        except ValueError:
            raise ValueError(
                f"arm {text!r} needs a number after the colon, for example {name}:0.01"
            ) from None
        if not 0 < value < (1 if takes == "fraction" else float("inf")):
            allowed = "a fraction in (0, 1)" if takes == "fraction" else f"a {takes} above 0"
            raise ValueError(f"arm {text!r}: the value must be {allowed}")
        return cls(name, value)

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}:{self.value:.12g}"

    @property
    def kind(self) -> Kind:
        """The arm's entry in the table ``ARMS``."""
        return ARMS[self.name]

    def plan(self, context: Context) -> Plan:
        """Make the mask and the optimizer for ``context.model``."""
        return self.kind.make(context, 1.0 if self.value is None else self.value)


def parse_arms(texts: list[str]) -> list[Arm]:
    """Read the names of all arms of a comparison, in order.

    Raises:
        ValueError: as ``Arm.parse``; an arm given twice; no ``adamw``, against which the others are
            read.
    """
    arms = [Arm.parse(text) for text in texts]
    for arm in arms:
        if arms.count(arm) > 1:
            raise ValueError(f"arm {arm} is given {arms.count(arm)} times; give each arm once")
    if Arm("adamw", None) not in arms:
        raise ValueError(
            f"arms {' '.join(map(str, arms))} lack adamw, against which the others are read; add it"
        )
    return arms
