"""A state on its way out and in: expanded where parameters are sharded; same parameters, mask and
anchor, and compact moments, when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from safeopt import ops
from safeopt.names import canonical
from safeopt.optim.anchor import Anchor
from safeopt.optim.live import LiveSet, named
from safeopt.sharding import cut, is_sharded, is_uncut, local, wrap

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
        for p in filter(is_sharded, own["params"]):
            for key, value in loaded["state"].get(p, {}).items():
                if isinstance(value, Tensor) and is_uncut(p, value):
                    loaded["state"][p][key] = wrap(cut(value, p).contiguous(), p)
        if live is None:
            continue
        for name, p, count in live.members(own):
            if count == 0:
                loaded["state"].pop(p, None)
            elif count < p.numel() and p in loaded["state"]:
                _compact(loaded["state"][p], name, p, live)


def expand(
    packed: dict[str, Any],
    groups: list[dict[str, Any]],
    members: Callable[[dict[str, Any]], Iterable[tuple[str, Tensor, int]]],
    live: LiveSet | None,
    plain: bool,
) -> None:
    """Bring the state of sharded parameters to their shape, as DTensors, in a packed state dict.

    Distributed checkpoints take a plain tensor for one that is whole on every rank, and want a
    state for every parameter that requires a gradient: wholly frozen ones get zeros.

    Args:
        packed: from torch's `state_dict`.
        groups: of the optimizer.
        members: (canonical name, parameter, live elements) of a group.
        live: the optimizer's live set.
        plain: do the same for parameters that are not sharded.
    """
    state = packed["state"]
    for group, saved in zip(groups, packed["param_groups"], strict=True):
        ruled = plain or any(map(is_sharded, group["params"]))
        if not (ruled and state and "param_names" in group):
            continue
        for number, (name, p, count) in zip(saved["params"], members(group), strict=True):
            if not (plain or is_sharded(p)):
                continue
            if count:
                own = state.get(number)
                if own:
                    state[number] = {key: _full(value, name, p, live) for key, value in own.items()}
            elif p.requires_grad:
                moments = MOMENTS if group["amsgrad"] else MOMENTS[:2]
                # Without a step, as a plain process, which has no such state, could not take it.
                state[number] = {key: wrap(torch.zeros_like(local(p)), p) for key in moments}


def _full(value: Any, name: str, p: Tensor, live: LiveSet | None) -> Any:
    if not isinstance(value, Tensor) or not value.dim() or is_sharded(value):
        return value
    part = local(p)
    if value.shape != part.shape:
        flat = torch.zeros(part.numel(), dtype=value.dtype, device=value.device)
        if value.numel():
            assert live is not None  # else nothing is compact
            where = ops.live_elements(part.numel(), *live.rule(name, p))
            flat[ops.live_indices(where, value.numel())] = value
        value = flat.view(part.shape)
    return wrap(value, p)


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


def _compact(state: dict[str, Any], name: str, p: Tensor, live: LiveSet) -> None:
    part, count = local(p), live.count_here(name, p)
    for key in MOMENTS:
        if key not in state:
            continue
        moment = state[key] = local(state[key])
        if moment.shape == (count,):
            continue
        if moment.shape != part.shape:
            raise ValueError(
                f"loaded {key} of {name!r} has shape {tuple(moment.shape)}; expected {(count,)}"
                f" (saved with this mask) or {tuple(part.shape)} (saved by a plain AdamW). A state"
                " that was saved without sharding holds live elements only, and cannot be sharded"
            )
        if not part.numel():  # this rank has no part of it
            state[key] = moment.reshape(-1)
            continue
        where = ops.live_elements(part.numel(), *live.rule(name, p))
        state[key] = moment.reshape(-1)[ops.live_indices(where.to(moment.device), count)]
