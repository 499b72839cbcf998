"""Fitting a loaded optimizer state: same parameters, same mask, same anchor, compact moments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from safeopt import ops
from safeopt.names import canonical
from safeopt.optim.anchor import Anchor
from safeopt.optim.live import LiveSet, named

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
OPTIONS: dict[str, Any] = {"anchor_strength": 0.0, "anchor_mode": "coupled"}
"""What a group without anchor says of it."""
DIGESTS = ("mask_digest", "anchor_digest", "anchor_values_digest")
"""What a group says of its mask and anchor: "" without one, and in older checkpoints."""


def fit(groups: list[dict[str, Any]], loaded: dict[str, Any], live: LiveSet | None) -> None:
    """Check a loaded state against an optimizer's groups, then make it fit `live`, in place.

    Args:
        groups: the optimizer's own groups.
        loaded: what torch hands to `__setstate__` on loading: "param_groups" in the order of
            `groups`, and "state" keyed by parameter.
        live: None leaves the state as it is. Else parameter-shaped moments (saved by a plain AdamW)
            become compact, and the state of wholly frozen parameters is dropped.

    Raises:
        ValueError: other parameters or another order, another mask, another anchor, moments of
            another shape.
    """
    for own, new in zip(groups, loaded["param_groups"], strict=True):
        _check_same(own, new)
        _check_anchor(own, new)
        new["mask_digest"] = own["mask_digest"]
        if live is None:
            continue
        for name, p, count in live.members(own):
            if count == 0:
                loaded["state"].pop(p, None)
            elif count < p.numel() and p in loaded["state"]:
                _compact(loaded["state"][p], name, p, count, live)


def settle(groups: list[dict[str, Any]], state: dict[Tensor, Any], anchor: Anchor | None) -> None:
    """Fill in what older groups lack; hand `anchor` the starting values of a loaded state."""
    for group in groups:
        for key, value in {**OPTIONS, **dict.fromkeys(DIGESTS, "")}.items():
            group.setdefault(key, value)
        for name, p in named(group, "anchor") if anchor is not None else ():
            if anchor is not None and p in state:
                anchor.restore(name, state[p])


def _check_same(own: dict[str, Any], new: dict[str, Any]) -> None:
    pairs = zip(own.get("param_names", ()), new.get("param_names", ()), strict=False)
    for place, (ours, theirs) in enumerate(pairs):
        if canonical(ours) != canonical(theirs):
            raise ValueError(
                f"the loaded state has {theirs!r} at place {place}, this optimizer {ours!r}: torch"
                " loads by order and would mix their moments. Build the optimizer with its"
                " parameters in the order of the saved run"
            )
    saved = new.get("mask_digest", "")
    if saved and saved != own["mask_digest"]:
        raise ValueError(
            f"the loaded state belongs to another mask (live elements {saved[:12]}, here"
            f" {own['mask_digest'][:12] or 'no mask'}): its moments are those of other elements."
            " Build the optimizer with the mask of the saved run, or start afresh"
        )


def _check_anchor(own: dict[str, Any], new: dict[str, Any]) -> None:
    saved = new.get("anchor_digest", "")
    if not saved:  # a run without anchor goes on with this one
        new.update({key: own[key] for key in (*OPTIONS, *DIGESTS)})
        return
    if saved != own["anchor_digest"]:
        raise ValueError(
            f"the loaded state belongs to a run with another anchor (scores {saved[:12]}, here"
            f" {own['anchor_digest'][:12] or 'none, or strength 0'}): build the optimizer with the"
            " anchor of the saved run and anchor_strength above 0, or start afresh"
        )
    saved = new["anchor_values_digest"]
    if saved != own["anchor_values_digest"]:
        found = own["anchor_values_digest"][:12] or "copies taken when the optimizer was built"
        raise ValueError(
            f"the saved run drew to the starting values {saved[:12] or 'in its checkpoint'}, this"
            f" one to {found}: give "
            + ("the anchor_values of the saved run" if saved else "anchor_values=None or 'cpu'")
        )


def _compact(state: dict[str, Any], name: str, p: Tensor, count: int, live: LiveSet) -> None:
    for key in MOMENTS:
        moment = state.get(key)
        if moment is None or moment.shape == (count,):
            continue
        if moment.shape != p.shape:
            raise ValueError(
                f"loaded {key} of {name!r} has shape {tuple(moment.shape)}; expected {(count,)}"
                f" (saved with this mask) or {tuple(p.shape)} (saved by a plain AdamW)"
            )
        where = ops.live_elements(p.numel(), *live.rule(name, moment.device))
        state[key] = moment.reshape(-1)[ops.live_indices(where, count)]
