"""Arms that hold changes on the alignment direction, with plain L2 and random directions beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from safeopt import names
from safeopt.compare.kinds import Context, Kind, Make, Plan
from safeopt.direction import AlignmentDirection
from safeopt.methods.safe_lora import apply_safe_lora
from safeopt.methods.safe_lora_weights import project_weights
from safeopt.optim import AsFTAdamW, project_step
from safeopt.scores import Scores

Pick = Callable[[Context], AlignmentDirection]


def _of(name: str) -> Pick:
    def pick(context: Context) -> AlignmentDirection:
        assert context.directions is not None  # compare refuses the arm otherwise
        return context.directions.of(name)

    return pick


def _random(name: str) -> Pick:
    return lambda context: _of(name)(context).random_like(context.seed)


def _l2(context: Context) -> AlignmentDirection:
    return _of("safelora")(context).l2_like()


def _avoided(name: str) -> Pick:
    return lambda context: _of(name)(context).complement()


def _asft(pick: Pick, *, rest: bool = False, **options: Any) -> Make:
    """AsFTAdamW with the picked direction, VALUE being its lambda.

    rest: plain L2 of the same strength on all weights that the direction does not cover.
    """

    def make(context: Context, lam: float) -> Plan:
        direction = pick(context)
        pull: dict[str, Any] = {}
        if rest:
            known = names.parameters(context.model)
            ones = {n: torch.ones_like(p) for n, p in known.items() if n not in direction}
            pull = {"anchor": Scores(ones), "anchor_strength": lam}
        return Plan(
            AsFTAdamW(
                context.model.named_parameters(),
                context.lr,
                weight_decay=context.weight_decay,
                direction=direction,
                lam=lam,
                freeze=context.freeze,
                **pull,
                **options,
            ),
            context.freeze,
        )

    return make


def _project(pick: Pick) -> Make:
    """AdamW, each of whose updates is projected."""

    def make(context: Context, _: float) -> Plan:
        named = context.model.named_parameters()
        optimizer = torch.optim.AdamW(named, context.lr, weight_decay=context.weight_decay)
        project_step(optimizer, pick(context), context.model)
        return Plan(optimizer)

    return make


def _safe_lora(pick: Pick) -> Make:
    """AdamW, then Safe LoRA, VALUE being the cosine up to which a layer is projected."""

    def make(context: Context, threshold: float) -> Plan:
        assert context.directions is not None
        direction, aligned = pick(context), context.directions.aligned

        def after(model: Any) -> None:
            if hasattr(model, "peft_config"):
                apply_safe_lora(model, direction, threshold=threshold)
            else:
                project_weights(model, direction, aligned, threshold=threshold)

        named = context.model.named_parameters()
        optimizer = torch.optim.AdamW(named, context.lr, weight_decay=context.weight_decay)
        return Plan(optimizer, after=after)

    return make


def _kind(summary: str, make: Make, takes: str = "strength", **options: Any) -> Kind:
    draws = takes == "strength"
    return Kind(
        summary, make, takes, **{"trains": "both", "directed": True, "draws": draws, **options}
    )


DIRECTION_ARMS: dict[str, Kind] = {
    "asft": _kind("AsFT: C = V V^T / ||V||_F, lambda VALUE", _asft(_of("safelora"))),
    "asft-l2": _kind("AsFT with C = 0, which is plain L2 on the same matrices", _asft(_l2),
                     control=True),
    "asft-random": _kind("AsFT with the same eigenvalues and random eigenvectors",
                         _asft(_random("safelora")), control=True),
    "asft-decoupled": _kind("AsFT beside the weight decay",
                            _asft(_of("safelora"), mode="decoupled")),
    "asft-decoupled-l2": _kind("the same with C = 0", _asft(_l2, mode="decoupled"), control=True),
    "asft-subspace": _kind("AsFT with the projector on V's top left singular vectors",
                           _asft(_of("subspace"))),
    "asft-subspace-random": _kind("the same on a random subspace", _asft(_random("subspace")),
                                  control=True),
    "asft-vector": _kind("AsFT with rank 1 on vec(V)", _asft(_of("vector"))),
    "asft-all": _kind("AsFT, and plain L2 on all other weights: l2 with the direction left free",
                      _asft(_of("safelora"), rest=True), trains="full"),
    "asft-all-random": _kind("the same with random eigenvectors",
                             _asft(_random("safelora"), rest=True), control=True, trains="full"),
    "asft-all-subspace": _kind("the same with the projector on V's top left singular vectors",
                               _asft(_of("subspace"), rest=True), trains="full"),
    "asft-all-subspace-random": _kind("the same on a random subspace",
                                      _asft(_random("subspace"), rest=True), control=True,
                                      trains="full"),
    "asft-along": _kind("the contrary: the top subspace is held, the rest free",
                        _asft(_avoided("subspace"))),
    "asft-alt": _kind("AsFT_Alt: the subspace of a short harmful fine-tune is held, the rest free",
                      _asft(_avoided("harmful"))),
    "project": _kind("AdamW, updates projected on V's top left singular vectors",
                     _project(_of("subspace")), "", trains="full"),
    "project-random": _kind("the same on a random subspace", _project(_random("subspace")), "",
                            control=True, trains="full"),
    "safe-lora": _kind("AdamW, then Safe LoRA where the cosine is at most VALUE",
                       _safe_lora(_of("safelora")), "fraction"),
    "safe-lora-random": _kind("the same with random eigenvectors", _safe_lora(_random("safelora")),
                              "fraction", control=True),
}  # fmt: skip
