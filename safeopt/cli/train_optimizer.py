"""The optimizer of `safeopt train`, by what is to be protected, and what it tells afterwards."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from safeopt.direction import AlignmentDirection
from safeopt.input_space import InputSpace
from safeopt.mask import SafetyMask
from safeopt.methods.safety_layers import freeze_whole, whole_names
from safeopt.optim import AsFTAdamW, SafeAdamW, project_step
from safeopt.scores import Scores

ALONE = ("freeze", "train", "anchor", "anchor_strength", "direction")


def require_alone(args: argparse.Namespace) -> None:
    """ValueError for options that go with no --space."""
    given = next((name for name in ALONE if args.space and getattr(args, name)), None)
    if given:
        raise ValueError(
            f"--space is {args.space} and --{given.replace('_', '-')} is {getattr(args, given)}; a"
            " space filters every update as a whole, so what a mask, an anchor or a direction asks"
            " of it would be mixed with the rest: give --space or the others, not both"
        )


def made(
    model: torch.nn.Module,
    args: argparse.Namespace,
    *,
    freeze: SafetyMask | None,
    train: SafetyMask | None,
    space: InputSpace | None,
) -> torch.optim.Optimizer:
    """AdamW within a space, or one of ours with masks, anchor and direction.

    With a space all else in the model is frozen, and hooks of the optimizer filter its updates.
    What a mask freezes as a whole gets no gradients.
    """
    if space is not None:
        space.freeze_rest(model)
        live = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(live, lr=args.lr, weight_decay=args.weight_decay)
        project_step(optimizer, space.to(live[0].device), model)
        return optimizer
    ours = _ours(model, args, freeze=freeze, train=train)
    if freeze is not None and whole_names(freeze):
        freeze_whole(model, freeze)
    return ours


def _ours(model: torch.nn.Module, args: argparse.Namespace, **masks: Any) -> SafeAdamW:
    options = {
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "anchor": Scores.load(args.anchor) if args.anchor not in (None, "uniform") else args.anchor,
        "anchor_strength": args.anchor_strength,
        "anchor_mode": args.anchor_mode,
        **masks,
    }
    if not args.direction:
        return SafeAdamW(model.named_parameters(), **options)
    direction = AlignmentDirection.load(args.direction)
    direction.check(model)
    return AsFTAdamW(
        model.named_parameters(),
        direction=direction,
        lam=args.lam,
        mode=args.direction_mode,
        **options,
    )


def live_count(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> tuple[int, int]:
    """Weights that were trained, and all."""
    if isinstance(optimizer, SafeAdamW):
        return optimizer.live_count()
    live = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return live, sum(p.numel() for p in model.parameters())


def penalties(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Those of anchor and direction at the end; 0 without."""
    anchor = optimizer.anchor_penalty() if isinstance(optimizer, SafeAdamW) else 0.0
    pull = optimizer.penalty() if isinstance(optimizer, AsFTAdamW) else 0.0
    return {"anchor_penalty": float(anchor), "direction_penalty": float(pull)}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Memory of the optimizer's state."""
    values: list[Any] = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if torch.is_tensor(value))
