"""Arms that freeze, train or draw weights by a mask or by scores, and plain AdamW."""

from __future__ import annotations

from collections.abc import Callable

import torch

from safeopt import artifact
from safeopt.compare.kinds import Context, Kind, Make, Plan
from safeopt.mask import SafetyMask
from safeopt.optim import SafeAdamW
from safeopt.optim.anchor import Mode, Shares
from safeopt.scores import Scores
from safeopt.selection import select

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


MASK_ARMS: dict[str, Kind] = {
    "adamw": Kind("all weights, torch's AdamW: the baseline", _adamw, "", trains="both"),
    "adamw-lr": Kind("the same at VALUE times the learning rate", _adamw, "factor", trains="both"),
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
