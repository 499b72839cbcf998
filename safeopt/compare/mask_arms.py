"""Arms that freeze, train or draw weights by a mask or by scores, and plain AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from safeopt import artifact
from safeopt.compare.kinds import Context, Kind, Make, Pick, Plan
from safeopt.mask import SafetyMask
from safeopt.methods.safety_layers import freeze_whole, whole_names
from safeopt.optim import SafeAdamW
from safeopt.optim.anchor import Mode, Shares
from safeopt.scores import Scores
from safeopt.selection import select


def _top(context: Context, fraction: float) -> SafetyMask:
    return select(context.scores, fraction)


def _random(context: Context, fraction: float) -> SafetyMask:
    return select(context.scores, fraction, order="random", seed=context.seed)


def _shuffled(context: Context, fraction: float) -> SafetyMask:
    return _top(context, fraction).shuffle(context.seed)


def frozen(context: Context, mask: SafetyMask) -> Plan:
    """SafeAdamW that freezes the mask; tensors frozen as a whole get no gradient either."""
    named = context.model.named_parameters()
    optimizer = SafeAdamW(named, context.lr, weight_decay=context.weight_decay, freeze=mask)
    if whole_names(mask):
        freeze_whole(context.model, mask)
    return Plan(optimizer, mask)


def freezing(summary: str, pick: Pick, takes: str = "fraction", **options: Any) -> Kind:
    """An arm that freezes the picked mask."""
    return Kind(
        summary, lambda context, value: frozen(context, pick(context, value)), takes,
        freezes=pick, **options,
    )  # fmt: skip


def training(pick: Pick) -> Make:
    """SafeAdamW that trains the picked mask alone."""

    def make(context: Context, value: Any) -> Plan:
        mask, named = pick(context, value), context.model.named_parameters()
        return Plan(
            SafeAdamW(named, context.lr, weight_decay=context.weight_decay, train=mask), mask
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
            freeze=context.freeze,
        )
        return Plan(optimizer, context.freeze)

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


def _draws(
    summary: str, shares: Callable[[Context], Shares], mode: Mode = "coupled", **options: Any
) -> Kind:
    return Kind(summary, _anchored(shares, mode), "strength", draws=True, **options)


MASK_ARMS: dict[str, Kind] = {
    "adamw": Kind("all weights, torch's AdamW: the baseline", _adamw, "", trains="both"),
    "adamw-lr": Kind("the same at VALUE times the learning rate", _adamw, "factor", trains="both"),
    "spa": freezing("freeze the top VALUE of the scored weights", _top),
    "spa-random": freezing("freeze as many at random over the model", _random, control=True),
    "spa-shuffle": freezing("freeze as many at random in each tensor", _shuffled, control=True),
    "set": Kind("train only the top VALUE of the scored weights", training(_top)),
    "set-random": Kind("train as many at random over the model", training(_random), control=True),
    "set-shuffle": Kind(
        "train as many at random in each tensor", training(_shuffled), control=True
    ),
    "l2": _draws("draw all weights to their start, strength VALUE", _uniform),
    "l2-decoupled": _draws("the same beside the weight decay", _uniform, "decoupled"),
    "anchor": _draws("draw each weight by its score, strength VALUE", _scores),
    "anchor-decoupled": _draws("the same beside the weight decay", _scores, "decoupled"),
    "anchor-shuffle": _draws("draw by scores shuffled in each tensor", _mixed, control=True),
}
